//! Work that is done band by band: which rows each operation computes for a band of output rows.
#![forbid(unsafe_code)]

use std::ops::Range;

use kernels::gemm::{Activation, Filter};
use kernels::view::{Border, Coding, ImageShape};

use super::builder::Dims;
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
    /// Filled by [`Bands::cut`].
    pub(super) bands: Vec<Band>,
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
}

/// What an operation does for a band.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// A pass: rows read. A GEMM: rows written. Sums: rows added.
    pub(super) rows: Range<usize>,
    /// The operand with its border: of a pass, what it writes; of a GEMM, what it reads.
    pub(super) operand: ImageShape,
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
    Extent { rows: first..last, operand: operand(last - first, Border { top, bottom, ..border }), skip: 0 }
}

fn join(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    if a.is_empty() { b.clone() } else { a.start.min(b.start)..a.end.max(b.end) }
}

impl Bands {
    /// The place of `rows` among the locals.
    pub(super) fn local(&self, rows: RowsBuf) -> Option<usize> {
        self.local.iter().position(|(r, _)| r.buf == rows.buf)
    }

    /// Cuts the output into bands of at most `rows` rows (several images count together), multiples of `unit` but for the
    /// last.
    pub(super) fn cut(&mut self, rows: usize, unit: usize) {
        let (batch, h) = (self.output.batch, self.output.h);
        let images = (rows / h).clamp(1, batch);
        let rows = (rows / unit).max(1).saturating_mul(unit).min(h);
        let mut bands = vec![];
        for image in (0..batch).step_by(images) {
            for y in (0..h).step_by(rows) {
                bands.push(self.place(image, images.min(batch - image), y..(y + rows).min(h)));
            }
        }
        self.bands = bands;
    }

    /// What each operation does for output rows `rows`: from the last to the first, each does what those behind it need.
    fn place(&self, image: usize, images: usize, rows: Range<usize>) -> Band {
        let mut local = vec![0..0; self.local.len()];
        let mut operands: Vec<(Buf, Range<usize>)> = vec![];
        let mut ops: Vec<Extent> = Vec::with_capacity(self.ops.len());
        let none = ImageShape { batch: images, h: 0, w: 0, border: Border::default() };
        for op in self.ops.iter().rev() {
            let mut need = |rows: RowsBuf, range: &Range<usize>| {
                if let Some(i) = self.local(rows) {
                    local[i] = join(&local[i], range);
                }
            };
            ops.push(match op {
                BandOp::Sums { source, .. } => {
                    source.iter().flatten().for_each(|r| need(*r, &rows));
                    Extent { rows: rows.clone(), operand: none, skip: 0 }
                }
                BandOp::Gemm { operand, residual, out, .. } => {
                    let range = self.local(*out).map_or(rows.clone(), |i| local[i].clone());
                    if let ResidualSpec::Rows(r) = residual
                        && let Some(i) = self.local(*r)
                    {
                        local[i] = join(&local[i], &range);
                    }
                    match operands.iter_mut().find(|(buf, _)| *buf == operand.buf) {
                        Some((_, r)) => assert_eq!(*r, range, "GEMMs of one operand compute the same rows"),
                        None => operands.push((operand.buf, range.clone())),
                    }
                    Extent { rows: range, operand: none, skip: 0 }
                }
                BandOp::Pass { source, input, filter, border, out, .. } => {
                    let (_, range) =
                        operands.iter().find(|(buf, _)| *buf == out.buf).expect("an operand is read");
                    let extent = window(*input, *filter, *border, images, range);
                    source.iter().flatten().for_each(|r| need(*r, &extent.rows));
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
        Band { image, images, rows, ops, local }
    }

    /// The images that `rows` are of.
    pub(super) fn dims(&self, rows: RowsBuf) -> Dims {
        self.local(rows).map_or(self.output, |i| self.local[i].1)
    }

    /// Multiplications and additions of `op` on a band.
    pub(super) fn operations(
        &self,
        op: &BandOp,
        band: &Band,
        extent: &Extent,
        weights: &[WeightSpec],
    ) -> u64 {
        let BandOp::Gemm { weight, out, .. } = op else { return 0 };
        let rows = band.images * extent.rows.len() * self.dims(*out).w;
        let s = weights[*weight].kind.shape().expect("a GEMM has a matrix");
        2 * (rows * s.n * s.taps * s.k) as u64
    }

    /// What `op` does on a band.
    pub(super) fn work(&self, op: &BandOp, band: &Band, extent: &Extent, plan: &Plan) -> Work {
        let pixels = |w: usize| band.images * extent.rows.len() * w;
        let source = |s: &SourceBufs, w| s.iter().flatten().map(|r| r.bytes(pixels(w))).sum::<u64>();
        let operand = |o: &OperandBuf| (extent.operand.operand_rows() * o.stride * o.kind.bytes()) as u64;
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
                let taps = plan.weights()[*weight].kind.shape().expect("a GEMM has a matrix").taps;
                let kind = if taps > 1 { "conv" } else { "linear" };
                (kind, operand(o) + plan.stored_bytes(*weight) as u64 + residual + out.bytes(pixels))
            }
            BandOp::Sums { source: s, .. } => ("statistics", source(s, self.output.w)),
        };
        Work { kind, operations: self.operations(op, band, extent, plan.weights()), bytes }
    }

    /// Calls `size` with each buffer of which only a band exists, and the bytes it needs.
    pub(super) fn sizes(&self, mut size: impl FnMut(Buf, usize)) {
        for band in &self.bands {
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
        }
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

#[cfg(test)]
mod tests {
    use super::super::steps::{OperandKind, RowsKind};
    use super::*;

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
                    let mut b = Bands { output: out, ops, local: vec![], bands: vec![] };
                    b.cut(rows_each, unit);
                    let mut seen = vec![0; batch * out.h];
                    for band in &b.bands {
                        assert!(band.images == 1 || band.rows == (0..out.h));
                        assert!(band.rows.start % unit == 0);
                        for i in band.image..band.image + band.images {
                            band.rows.clone().for_each(|y| seen[i * out.h + y] += 1);
                        }
                        let win = &band.ops[0];
                        assert!(win.rows.end <= h);
                        let (oh, _) = filter.output(&win.operand);
                        if filter.upsample {
                            assert!(win.skip + band.rows.len() <= oh);
                            for y in band.rows.clone() {
                                for tap in 0..3usize {
                                    // The doubled row it reads is inside the window or outside the image.
                                    let Some(d) = (y + tap).checked_sub(1).filter(|d| *d < 2 * h) else {
                                        continue;
                                    };
                                    assert!(win.rows.contains(&(d / 2)));
                                }
                            }
                        } else {
                            assert_eq!(oh, band.rows.len());
                            let start = (band.rows.start * filter.stride) as isize - border.top as isize;
                            assert_eq!(win.rows.start as isize - win.operand.border.top as isize, start);
                        }
                    }
                    assert!(seen.iter().all(|&n| n == 1), "{filter:?} {h} {rows_each} {batch}");
                }
            }
        }
    }

    /// A value inside is made for the rows that the filter behind it reaches, and is large enough for every band.
    #[test]
    fn a_chain_grows_by_its_filters() {
        let conv = |upsample| Filter { kh: 3, kw: 3, stride: 1, upsample };
        let input = Dims { batch: 1, h: 8, w: 4 };
        let doubled = output(input, conv(true), ONE);
        let mut ops = layer(10, rows(0), input, conv(true), ONE, rows(1)).to_vec();
        ops.extend(layer(11, rows(1), doubled, conv(false), ONE, rows(2)));
        ops.extend(layer(12, rows(2), doubled, conv(false), ONE, rows(3)));
        let local = vec![(rows(1), doubled), (rows(2), doubled)];
        let mut b = Bands { output: doubled, ops, local, bands: vec![] };
        b.cut(4, 1);
        assert_eq!(b.bands.len(), 4);
        let middle = &b.bands[1]; // rows 4 to 8
        assert_eq!(middle.local, [2..10, 3..9]);
        assert_eq!((middle.ops[0].rows.clone(), middle.ops[1].skip), (0..6, 2));
        assert_eq!(b.bands[0].local, [0..6, 0..5]);
        let mut most = 0;
        b.sizes(|buf, bytes| {
            if buf == 1 {
                most = most.max(bytes)
            }
        });
        assert_eq!(most, 8 * 8 * 4);
    }
}
