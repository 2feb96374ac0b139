//! Work that is done band by band: which rows each operation computes for a band of output rows.
#![forbid(unsafe_code)]

use std::ops::Range;

use kernels::gemm::{Activation, Filter};
use kernels::view::{Border, Coding, ImageShape};

use super::network::Dims;
use super::plan::Plan;
use super::steps::{Buf, NormSpec, OperandBuf, ResidualSpec, RowsBuf, SourceBufs};
use super::weight::WeightSpec;

/// A piece of work that is done band by band.
#[derive(Clone, Debug)]
pub(super) enum BandOp {
    /// Makes the operand of GEMMs with this filter, for the rows they compute and what the filter reaches beyond them.
    Pass {
        source: SourceBufs,
        /// The source's images.
        input: Dims,
        filter: Filter,
        border: Border,
        norm: NormSpec,
        activation: Activation,
        /// A weight: what channels are multiplied by.
        factors: Option<usize>,
        out: OperandBuf,
    },
    Gemm {
        operand: OperandBuf,
        weight: usize,
        bias: Option<usize>,
        image_bias: Option<Buf>,
        activation: Activation,
        residual: ResidualSpec,
        out: RowsBuf,
    },
    /// Adds the band's rows to the partial sums of group statistics.
    Sums { source: SourceBufs, groups: usize, sums: Buf },
}

/// Passes, GEMMs and sums over the same images, band by band, so that operands, and values that are only needed inside, never
/// exist as a whole.
#[derive(Clone, Debug)]
pub(super) struct Bands {
    /// The images that the last operation writes or sums. Where all filters are points, rows are single pixels: `h * w`
    /// by 1.
    pub(super) output: Dims,
    pub(super) ops: Vec<BandOp>,
    /// Plain rows of one band only, with the images they are of; all other rows are whole tensors.
    pub(super) local: Vec<(RowsBuf, Dims)>,
    /// Rows of a band, several images together.
    pub(super) rows: usize,
    /// Rows of which sums are taken at a time, or a multiple.
    pub(super) unit: usize,
}

/// Some output rows of some images, and what each operation does for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Band {
    /// First image.
    pub(super) image: usize,
    /// Images; more than one only with all their rows.
    pub(super) images: usize,
    /// Output rows of each image.
    pub(super) rows: Range<usize>,
    /// For each operation.
    pub(super) ops: Vec<Extent>,
    /// Rows that each of [`Bands::local`] holds.
    pub(super) local: Vec<Range<usize>>,
    /// What the band before has made and this one needs again, before anything else is done.
    pub(super) moves: Vec<Move>,
}

/// Bytes that change their place in a buffer of which only a band exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) buf: Buf,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) bytes: usize,
}

/// What an operation does for a band.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// A pass: rows read. A GEMM: rows written. Sums: rows added. None where bands before have done it all.
    pub(super) rows: Range<usize>,
    /// The operand with its border, as GEMMs read it.
    pub(super) operand: ImageShape,
    /// Rows of pixels at the top of the operand that are there already; with any, the border above them is too.
    pub(super) kept: usize,
    /// The first row that a GEMM computes, counted in those that its operand yields.
    pub(super) skip: usize,
}

/// What an operation costs on a band.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// What kind of work it is.
    pub(super) kind: &'static str,
    /// Multiplications and additions.
    pub(super) operations: u64,
    /// Bytes read and written, each counted once.
    pub(super) bytes: u64,
}

/// The rows of `input` behind output rows `rows` of a filter, and the operand that holds them.
fn window(input: Dims, filter: Filter, border: Border, images: usize, rows: &Range<usize>) -> Extent {
    let operand = |h, border| ImageShape { batch: images, h, w: input.w, border };
    if filter.upsample {
        // Output row y reads doubled rows y - 1 to y + 1.
        let first = (rows.start / 2).saturating_sub(1);
        let end = (rows.end.div_ceil(2) + 1).min(input.h);
        return Extent {
            rows: first..end,
            operand: operand(end - first, border),
            kept: 0,
            skip: rows.start - 2 * first,
        };
    }
    // In rows of the bordered input.
    let start = rows.start * filter.stride;
    let end = start + (rows.len() - 1) * filter.stride + filter.kh;
    let top = border.top.saturating_sub(start);
    let first = start.saturating_sub(border.top);
    let last = (end - border.top).min(input.h);
    let bottom = (end - border.top).saturating_sub(input.h);
    let operand = operand(last - first, Border { top, bottom, ..border });
    Extent { rows: first..last, operand, kept: 0, skip: 0 }
}

impl Extent {
    /// What a pass writes, and the operand row (of all with borders) where that begins.
    pub(super) fn written(&self) -> (ImageShape, usize) {
        let ImageShape { batch, h, border, .. } = self.operand;
        if self.kept == 0 {
            return (self.operand, 0);
        }
        assert_eq!(batch, 1, "only bands of one image keep rows");
        let fresh = ImageShape { h: h - self.kept, border: Border { top: 0, ..border }, ..self.operand };
        (fresh, (border.top + self.kept) * self.operand.full_w())
    }
}

impl Bands {
    /// The place of `rows` among the locals.
    pub(super) fn local(&self, rows: RowsBuf) -> Option<usize> {
        self.local.iter().position(|(r, _)| r.buf == rows.buf)
    }

    /// Work over `output`, in one band.
    pub(super) fn new(output: Dims, ops: Vec<BandOp>, local: Vec<(RowsBuf, Dims)>) -> Bands {
        Bands { output, ops, local, rows: output.batch * output.h, unit: 1 }
    }

    /// How many bands there are.
    pub(super) fn count(&self) -> usize {
        let Dims { batch, h, .. } = self.output;
        batch.div_ceil(self.images()) * h.div_ceil(self.rows.min(h))
    }

    /// Images of a band.
    fn images(&self) -> usize {
        (self.rows / self.output.h).clamp(1, self.output.batch)
    }

    /// The band behind `before`, or the first.
    pub(super) fn next(&self, before: Option<&Band>) -> Option<Band> {
        let Dims { batch, h, .. } = self.output;
        let rows = |y: usize| y..(y + self.rows).min(h);
        let (image, before) = match before {
            None => (0, None),
            Some(b) if b.rows.end < h => (b.image, before),
            Some(b) => (b.image + b.images, None),
        };
        let images = self.images().min(batch - image);
        (images > 0).then(|| self.place(image, images, rows(before.map_or(0, |b| b.rows.end)), before))
    }

    /// What each operation does for output rows `rows`, in this order: from the last to the first, each does what those
    /// behind it need and the band `before` has not done. So every row is made once, and rows of a whole tensor at or above
    /// those that have been written are not read again.
    fn place(&self, image: usize, images: usize, rows: Range<usize>, before: Option<&Band>) -> Band {
        // For each local what readers begin and end with.
        let mut needs: Vec<Option<Range<usize>>> = vec![None; self.local.len()];
        let mut local = vec![0..0; self.local.len()];
        let mut operands: Vec<(Buf, Range<usize>)> = vec![];
        let mut ops: Vec<Extent> = Vec::with_capacity(self.ops.len());
        let mut moves = vec![];
        let none = ImageShape { batch: images, h: 0, w: 0, border: Border::default() };
        for (i, op) in self.ops.iter().enumerate().rev() {
            let wanted = match op {
                BandOp::Gemm { out, .. } => self.local(*out).map(|i| needs[i].clone()),
                _ => None,
            };
            let wanted = wanted.map(|range| range.expect("a local is read by what follows"));
            let mut need = |read: &mut dyn Iterator<Item = RowsBuf>, range: &Range<usize>| {
                for i in read.filter_map(|rows| self.local(rows)) {
                    needs[i] = Some(match &needs[i] {
                        Some(r) => r.start.min(range.start)..r.end.max(range.end),
                        None => range.clone(),
                    });
                }
            };
            ops.push(match op {
                BandOp::Sums { source, .. } => {
                    let start = before.map_or(rows.start, |b| b.ops[i].rows.end);
                    need(&mut source.iter().flatten().copied(), &(start..rows.end));
                    let whole =
                        if rows.end == self.output.h { rows.end } else { rows.end / self.unit * self.unit };
                    Extent { rows: start..whole.max(start), operand: none, kept: 0, skip: 0 }
                }
                BandOp::Gemm { operand, residual, out, .. } => {
                    let range = match self.local(*out).zip(wanted) {
                        None => rows.clone(),
                        Some((i, wanted)) => {
                            let held = before.map_or(0..0, |b| b.local[i].clone());
                            let start = if before.is_some() { held.end } else { wanted.start };
                            let end = wanted.end.max(start);
                            local[i] = wanted.start.min(start)..end;
                            let line = self.local[i].1.w * out.c * out.kind.bytes();
                            let kept = start - local[i].start;
                            let from = local[i].start.saturating_sub(held.start) * line;
                            moves.push(Move { buf: out.buf, from, to: 0, bytes: kept * line });
                            start..end
                        }
                    };
                    if let ResidualSpec::Rows(r) = residual {
                        need(&mut [*r].into_iter(), &range);
                    }
                    match operands.iter_mut().find(|(buf, _)| *buf == operand.buf) {
                        Some((_, r)) => assert_eq!(*r, range, "GEMMs of one operand compute the same rows"),
                        None => operands.push((operand.buf, range.clone())),
                    }
                    Extent { rows: range, operand: none, kept: 0, skip: 0 }
                }
                BandOp::Pass { source, input, filter, border, out, .. } => {
                    let (_, range) =
                        operands.iter().find(|(buf, _)| *buf == out.buf).expect("an operand is read");
                    let extent = match before.map(|b| &b.ops[i]) {
                        None => window(*input, *filter, *border, images, range),
                        // Upsampling: the rows before reach far enough.
                        Some(done) if range.is_empty() => {
                            Extent { rows: done.rows.end..done.rows.end, kept: done.operand.h, ..*done }
                        }
                        Some(done) => {
                            let mut extent = window(*input, *filter, *border, images, range);
                            let first = extent.rows.start;
                            extent.kept = done.rows.end.saturating_sub(first);
                            extent.rows.start = first.max(done.rows.end);
                            let was = done.operand.border.top + done.operand.h - extent.kept;
                            let now = extent.operand.border.top;
                            let line = |element: usize, rows| rows * extent.operand.full_w() * element;
                            let mut slide = |buf, element| {
                                let [from, to, bytes] = [was, now, extent.kept].map(|n| line(element, n));
                                moves.push(Move { buf, from, to, bytes });
                            };
                            slide(out.buf, out.stride * out.kind.bytes());
                            out.scale.filter(|_| !out.uniform).into_iter().for_each(|scale| slide(scale, 4));
                            extent
                        }
                    };
                    need(&mut source.iter().flatten().copied(), &extent.rows);
                    extent
                }
            });
        }
        ops.reverse();
        // A GEMM reads the operand that its pass wrote.
        for i in 0..ops.len() {
            if let BandOp::Gemm { operand, .. } = &self.ops[i] {
                let pass = self.ops[..i]
                    .iter()
                    .rposition(|op| matches!(op, BandOp::Pass { out, .. } if out.buf == operand.buf));
                let from = &ops[pass.expect("an operand is written before it is read")];
                (ops[i].operand, ops[i].skip) = (from.operand, from.skip);
            }
        }
        moves.retain(|m| m.bytes > 0 && m.from != m.to);
        Band { image, images, rows, ops, local, moves }
    }

    /// The images that `rows` are of.
    pub(super) fn dims(&self, rows: RowsBuf) -> Dims {
        self.local(rows).map_or(self.output, |i| self.local[i].1)
    }

    /// Multiplications and additions for so many pixels of what `op` writes.
    fn products(op: &BandOp, pixels: usize, weights: &[WeightSpec]) -> u64 {
        let BandOp::Gemm { weight, .. } = op else { return 0 };
        let s = weights[*weight].kind.shape().expect("a GEMM has a matrix");
        2 * (pixels * s.n * s.taps * s.k) as u64
    }

    /// Multiplications and additions of all bands.
    pub(super) fn operations(&self, weights: &[WeightSpec]) -> u64 {
        let of = |op: &BandOp| match op {
            BandOp::Gemm { out, .. } => Bands::products(op, self.dims(*out).pixels(), weights),
            _ => 0,
        };
        self.ops.iter().map(of).sum()
    }

    /// What `op` does on a band.
    pub(super) fn work(&self, op: &BandOp, band: &Band, extent: &Extent, plan: &Plan) -> Work {
        let pixels = |w: usize| band.images * extent.rows.len() * w;
        let source = |s: &SourceBufs, w| s.iter().flatten().map(|r| r.bytes(pixels(w))).sum::<u64>();
        let operand = |o: &OperandBuf| (extent.operand.operand_rows() * o.stride * o.kind.bytes()) as u64;
        let mut operations = 0;
        let (kind, bytes) = match op {
            BandOp::Pass { source: s, input, norm, out, .. } => {
                let kind = match norm {
                    NormSpec::None | NormSpec::Range { .. } => "convert",
                    NormSpec::Group { .. } => "group norm",
                    NormSpec::Layer { .. } => "layer norm",
                };
                (kind, source(s, input.w) + operand(out))
            }
            BandOp::Gemm { operand: o, weight, residual, out, .. } => {
                let pixels = pixels(self.dims(*out).w);
                let residual = match residual {
                    ResidualSpec::None => 0,
                    ResidualSpec::Rows(r) => r.bytes(pixels),
                    ResidualSpec::InPlace => out.bytes(pixels),
                };
                operations = Bands::products(op, pixels, plan.weights());
                let taps = plan.weights()[*weight].kind.shape().expect("a GEMM has a matrix").taps;
                let kind = if taps > 1 { "conv" } else { "linear" };
                (kind, operand(o) + plan.stored_bytes(*weight) as u64 + residual + out.bytes(pixels))
            }
            BandOp::Sums { source: s, .. } => ("statistics", source(s, self.output.w)),
        };
        Work { kind, operations, bytes }
    }

    /// Calls `size` with each buffer of which only a band exists, and the bytes it needs.
    pub(super) fn sizes(&self, mut size: impl FnMut(Buf, usize)) {
        let enough = self.enough();
        let mut last = None;
        while let Some(band) = self.next(last.as_ref())
            && band.image == 0
            && band.rows.start < enough
        {
            for ((r, dims), range) in self.local.iter().zip(&band.local) {
                size(r.buf, band.images * range.len() * dims.w * r.c * r.kind.bytes());
            }
            for (op, extent) in self.ops.iter().zip(&band.ops) {
                if let BandOp::Pass { out, .. } = op {
                    let rows = extent.operand.operand_rows();
                    size(out.buf, rows * out.stride * out.kind.bytes());
                    let scales = if out.uniform { band.images * size_of::<Coding>() } else { rows * 4 };
                    out.scale.into_iter().for_each(|scale| size(scale, scales));
                }
            }
            last = Some(band);
        }
    }

    /// Bands of the first image that begin above this row hold as much as any: filters no longer meet the top, and what bands
    /// do has begun again.
    fn enough(&self) -> usize {
        let filters = self.ops.iter().filter_map(|op| match op {
            BandOp::Pass { filter, .. } => Some(filter.upsample),
            _ => None,
        });
        let (filters, doublings) = filters.fold((0, 0), |(n, d), doubles| (n + 1, d + usize::from(doubles)));
        2 * lcm(lcm(self.rows, self.unit), 1 << doublings) + 4 * filters + 2 * self.rows
    }

    /// Bytes of the buffers of which only a band exists.
    pub(super) fn local_bytes(&self) -> usize {
        let mut sizes = std::collections::HashMap::new();
        self.sizes(|buf, bytes| {
            let most: &mut usize = sizes.entry(buf).or_default();
            *most = bytes.max(*most);
        });
        sizes.values().sum()
    }
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::super::steps::{OperandKind, RowsKind};
    use super::*;

    fn each(bands: &Bands) -> Vec<Band> {
        let mut each: Vec<Band> = vec![];
        while let Some(band) = bands.next(each.last()) {
            each.push(band);
        }
        each
    }

    const ONE: Border = Border { top: 1, left: 1, bottom: 1, right: 1 };

    fn rows(buf: Buf) -> RowsBuf {
        RowsBuf { buf, kind: RowsKind::F32, c: 1 }
    }

    fn layer(at: Buf, x: RowsBuf, input: Dims, filter: Filter, border: Border, out: RowsBuf) -> [BandOp; 2] {
        let operand = OperandBuf { buf: at, scale: None, uniform: false, kind: OperandKind::F32, stride: 64 };
        let (norm, activation) = (NormSpec::None, Activation::None);
        let (bias, image_bias, residual) = (None, None, ResidualSpec::None);
        let (source, factors) = ([Some(x), None], None);
        [
            BandOp::Pass { source, input, filter, border, norm, activation, factors, out: operand },
            BandOp::Gemm { operand, weight: 0, bias, image_bias, activation, residual, out },
        ]
    }

    fn output(input: Dims, filter: Filter, border: Border) -> Dims {
        let shape = ImageShape { batch: input.batch, h: input.h, w: input.w, border };
        let (h, w) = filter.output(&shape);
        Dims { h, w, ..input }
    }

    /// Every output row once, and each from exactly the input rows its filter reaches.
    #[test]
    fn bands_cover_the_output_and_windows_the_filter() {
        let late = Border { top: 0, left: 0, bottom: 1, right: 1 };
        let conv = |stride, upsample| Filter { kh: 3, kw: 3, stride, upsample };
        let cases = [(Filter::POINT, Border::default()), (conv(1, false), ONE), (conv(2, false), ONE)];
        for (filter, border) in cases.into_iter().chain([(conv(2, false), late), (conv(1, true), ONE)]) {
            for h in [1usize, 2, 3, 7, 8, 16] {
                if h + border.top + border.bottom < filter.kh {
                    continue;
                }
                for (rows_each, unit, batch) in
                    [(1, 1, 1), (2, 1, 2), (3, 2, 3), (5, 1, 2), (8, 4, 1), (100, 1, 3)]
                {
                    let input = Dims { batch, h, w: 5 };
                    let out = output(input, filter, border);
                    let ops = layer(9, rows(0), input, filter, border, rows(1)).to_vec();
                    let b = Bands { rows: rows_each, unit, ..Bands::new(out, ops, vec![]) };
                    let mut seen = vec![0; batch * out.h];
                    let mut read = 0;
                    for band in each(&b) {
                        assert!(band.images == 1 || band.rows == (0..out.h));
                        for i in band.image..band.image + band.images {
                            band.rows.clone().for_each(|y| seen[i * out.h + y] += 1);
                        }
                        let win = &band.ops[0];
                        assert!(win.rows.end <= h);
                        // Every row is read by one band of an image.
                        let fresh = if band.rows.start == 0 { 0 } else { read };
                        assert!(win.rows.start == fresh || win.kept == 0);
                        read = win.rows.end;
                        let held = win.rows.start - win.kept..win.rows.end;
                        let (oh, _) = filter.output(&win.operand);
                        if filter.upsample {
                            assert!(win.skip + band.rows.len() <= oh);
                            for y in band.rows.clone() {
                                for tap in 0..3usize {
                                    // The doubled row it reads is inside the window or outside the image.
                                    let Some(d) = (y + tap).checked_sub(1).filter(|d| *d < 2 * h) else {
                                        continue;
                                    };
                                    assert!(held.contains(&(d / 2)));
                                }
                            }
                        } else {
                            assert_eq!(oh, band.rows.len());
                            let start = (band.rows.start * filter.stride) as isize - border.top as isize;
                            assert_eq!(held.start as isize - win.operand.border.top as isize, start);
                        }
                    }
                    assert!(seen.iter().all(|&n| n == 1), "{filter:?} {h} {rows_each} {batch}");
                }
            }
        }
    }

    /// A value inside is ahead of the band by what the filters behind it reach, and every row of it is made once.
    #[test]
    fn a_chain_runs_ahead_by_its_filters() {
        let conv = |upsample| Filter { kh: 3, kw: 3, stride: 1, upsample };
        let input = Dims { batch: 1, h: 8, w: 4 };
        let doubled = output(input, conv(true), ONE);
        let mut ops = layer(10, rows(0), input, conv(true), ONE, rows(1)).to_vec();
        ops.extend(layer(11, rows(1), doubled, conv(false), ONE, rows(2)));
        ops.extend(layer(12, rows(2), doubled, conv(false), ONE, rows(3)));
        let local = vec![(rows(1), doubled), (rows(2), doubled)];
        let b = Bands { rows: 4, ..Bands::new(doubled, ops, local) };
        let bands = each(&b);
        assert_eq!((bands.len(), b.count()), (4, 4));
        let made = |op: usize| bands.iter().map(|band| band.ops[op].rows.clone()).collect::<Vec<_>>();
        assert_eq!(made(1), [0..6, 6..10, 10..14, 14..16]); // two rows ahead
        assert_eq!(made(3), [0..5, 5..9, 9..13, 13..16]);
        assert_eq!(made(5), [0..4, 4..8, 8..12, 12..16]);
        let middle = &bands[1]; // rows 4 to 8
        assert_eq!(middle.local, [6..10, 5..9]); // behind them passes keep what they need again
        assert_eq!((middle.ops[0].rows.clone(), middle.ops[0].kept, middle.ops[1].skip), (4..6, 2, 2));
        let line = (4 + 2) * 64 * 4; // pixels with their border, elements, bytes
        let slide = Move { buf: 10, from: 3 * line, to: line, bytes: 2 * line };
        assert!(middle.moves.contains(&slide), "{:?}", middle.moves);
        let mut most = 0;
        b.sizes(|buf, bytes| {
            if buf == 1 {
                most = most.max(bytes)
            }
        });
        assert_eq!(most, 6 * 8 * 4);
    }

    /// No band holds more than the samples do.
    #[test]
    fn samples_hold_as_much_as_any_band() {
        let conv = |upsample| Filter { kh: 3, kw: 3, stride: 1, upsample };
        for (h, rows_each, unit) in
            [(64, 4, 8), (96, 4, 12), (100, 3, 7), (61, 1, 5), (128, 8, 16), (128, 5, 16), (80, 2, 1)]
        {
            let input = Dims { batch: 1, h, w: 2 };
            let doubled = output(input, conv(true), ONE);
            let mut ops = layer(10, rows(0), input, conv(true), ONE, rows(1)).to_vec();
            ops.extend(layer(11, rows(1), doubled, conv(false), ONE, rows(2)));
            ops.extend(layer(12, rows(1), doubled, Filter::POINT, Border::default(), rows(3)));
            ops.extend(layer(13, rows(2), doubled, conv(false), ONE, rows(4)));
            ops.push(BandOp::Sums { source: [Some(rows(4)), Some(rows(3))], groups: 1, sums: 20 });
            let local = (1..5).map(|i| (rows(i), doubled)).collect();
            let b = Bands { rows: rows_each, unit, ..Bands::new(doubled, ops, local) };
            let most = |bands: &[Band]| {
                let (mut held, mut operands) = ([0; 4], [0; 4]);
                for band in bands {
                    for (most, r) in held.iter_mut().zip(&band.local) {
                        *most = r.len().max(*most);
                    }
                    for (most, op) in operands.iter_mut().zip([0, 2, 4, 6]) {
                        *most = band.ops[op].operand.full_h().max(*most);
                    }
                }
                (held, operands)
            };
            let all = each(&b);
            let samples = all.partition_point(|band| band.rows.start < b.enough());
            assert_eq!(most(&all[..samples]), most(&all), "{h} {rows_each} {unit}");
        }
    }
}
