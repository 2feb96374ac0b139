//! What a plan is made of: buffers by number, and steps that read and write them.
#![forbid(unsafe_code)]

use kernels::attention::{AttentionShape, Products};
use kernels::gemm::{Activation, Filter};
use kernels::view::{Border, ImageShape};

use super::builder::Dims;
use super::weight::WeightSpec;

/// A buffer of the plan, by number.
pub(super) type Buf = usize;

/// Element type of plain rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowsKind {
    F32,
    Bf16,
    /// Token ids.
    U32,
}

impl RowsKind {
    pub(super) fn bytes(self) -> usize {
        match self {
            RowsKind::F32 | RowsKind::U32 => 4,
            RowsKind::Bf16 => 2,
        }
    }
}

/// Plain rows `[pixels, c]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsBuf {
    pub(super) buf: Buf,
    pub(super) kind: RowsKind,
    pub(super) c: usize,
}

/// Element type of a GEMM's left operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum OperandKind {
    U8,
    Bf16,
    F32,
}

impl OperandKind {
    pub(super) fn bytes(self) -> usize {
        match self {
            OperandKind::U8 => 1,
            OperandKind::Bf16 => 2,
            OperandKind::F32 => 4,
        }
    }
}

/// Rows of an operand, with border and slack, for one band.
#[derive(Clone, Copy, Debug)]
pub(super) struct OperandBuf {
    pub(super) buf: Buf,
    /// Scales of the rows, for `U8`.
    pub(super) scale: Option<Buf>,
    pub(super) kind: OperandKind,
    pub(super) stride: usize,
}

/// One or two tensors side by side.
pub(super) type SourceBufs = [Option<RowsBuf>; 2];

/// How a pass normalizes; numbers are weights.
#[derive(Clone, Copy, Debug)]
pub(super) enum NormSpec {
    None,
    Group { stats: Buf, groups: usize, gamma: usize, beta: usize },
    Layer { gamma: usize, beta: usize, eps: f32 },
}

/// Where the residual of a GEMM comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum ResidualSpec {
    None,
    Rows(RowsBuf),
    /// From where the result goes.
    InPlace,
}

/// A piece of work that is done band by band.
#[derive(Clone, Debug)]
pub(super) enum BandOp {
    /// Makes the operand that the GEMMs behind it read, for the band's rows and what the filter reaches beyond them.
    Pass { source: SourceBufs, norm: NormSpec, activation: Activation, out: OperandBuf },
    Gemm {
        operand: OperandBuf,
        weight: usize,
        bias: Option<usize>,
        image_bias: Option<Buf>,
        activation: Activation,
        residual: ResidualSpec,
        out: RowsBuf,
    },
}

/// Passes and GEMMs over the same pixels, band by band, so that operands and what lies between GEMMs never exist as a whole.
#[derive(Clone, Debug)]
pub(super) struct Bands {
    /// Input of the first pass: `batch` images. Where all filters are points, rows are single pixels: `h * w` by 1.
    pub(super) input: Dims,
    /// The first filter; all others are points.
    pub(super) filter: Filter,
    /// Border of the first operand.
    pub(super) border: Border,
    /// Output: images of the same batch.
    pub(super) output: Dims,
    /// Most output rows of a band, of all its images together: a part of one image, or whole images.
    pub(super) rows: usize,
    pub(super) ops: Vec<BandOp>,
    /// Buffers that hold one band only; all others hold the whole tensor.
    pub(super) local: Vec<Buf>,
}

/// Some output rows of some images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Band {
    /// First image.
    pub(super) image: usize,
    /// Images; more than one only with all their rows.
    pub(super) images: usize,
    /// First output row.
    pub(super) y: usize,
    /// Output rows of each image.
    pub(super) rows: usize,
}

/// What a band reads of its input images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// First input row.
    pub(super) y: usize,
    /// The input rows with their border.
    pub(super) shape: ImageShape,
    /// The first of the band's output rows, counted in those that `shape` yields.
    pub(super) skip: usize,
}

impl Bands {
    /// All bands, in order.
    pub(super) fn bands(&self) -> impl Iterator<Item = Band> + use<> {
        let (batch, h) = (self.output.batch, self.output.h);
        let images = (self.rows / h).max(1).min(batch);
        let rows = self.rows.min(h);
        (0..batch).step_by(images).flat_map(move |image| {
            let images = images.min(batch - image);
            (0..h).step_by(rows).map(move |y| Band { image, images, y, rows: rows.min(h - y) })
        })
    }

    /// What `band` reads.
    pub(super) fn window(&self, band: Band) -> Window {
        let (h, w) = (self.input.h, self.input.w);
        let shape = |rows, border| ImageShape { batch: band.images, h: rows, w, border };
        if self.filter.upsample {
            // Output row y reads doubled rows y - 1 to y + 1.
            let first = (band.y / 2).saturating_sub(1);
            let end = ((band.y + band.rows).div_ceil(2) + 1).min(h);
            return Window { y: first, shape: shape(end - first, self.border), skip: band.y - 2 * first };
        }
        // In rows of the bordered input.
        let start = band.y * self.filter.stride;
        let end = start + (band.rows - 1) * self.filter.stride + self.filter.kh;
        let top = self.border.top.saturating_sub(start);
        let first = start.saturating_sub(self.border.top);
        let last = (end - self.border.top).min(h);
        let bottom = (end - self.border.top).saturating_sub(h);
        Window { y: first, shape: shape(last - first, Border { top, bottom, ..self.border }), skip: 0 }
    }
}

/// What a step does.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Bands(Bands),
    GroupStats {
        source: SourceBufs,
        image: ImageShape,
        groups: usize,
        eps: f32,
        stats: Buf,
    },
    /// A value in the form of plain rows.
    Rows {
        source: SourceBufs,
        image: ImageShape,
        norm: NormSpec,
        activation: Activation,
        out: RowsBuf,
    },
    Attention {
        shape: AttentionShape,
        q: RowsBuf,
        k: RowsBuf,
        v: RowsBuf,
        causal: bool,
        products: Products,
        workspace: Buf,
        out: RowsBuf,
    },
    Lookup {
        ids: Buf,
        table: usize,
        positions: usize,
        out: RowsBuf,
    },
    Resize {
        x: RowsBuf,
        from: Dims,
        to: Dims,
        out: RowsBuf,
    },
}

/// One operation of a plan.
#[derive(Clone, Debug)]
pub struct Step {
    /// The layer it belongs to.
    pub path: String,
    pub(super) op: Op,
    /// Weights it reads, numbers in [`super::Plan::weights`].
    pub weights: Vec<usize>,
}

impl Step {
    /// What kind of work it is.
    pub fn kind(&self) -> &'static str {
        match &self.op {
            Op::Bands(b) if b.filter.kh > 1 => "conv",
            Op::Bands(_) => "linear",
            Op::GroupStats { .. } => "norm",
            Op::Rows { .. } => "pass",
            Op::Attention { .. } => "attention",
            Op::Lookup { .. } => "lookup",
            Op::Resize { .. } => "resize",
        }
    }

    /// Multiplications and additions of its matrix products.
    pub fn operations(&self, weights: &[WeightSpec]) -> u64 {
        match &self.op {
            Op::Bands(b) => {
                let matrix = |op: &BandOp| match op {
                    BandOp::Gemm { weight, .. } => weights[*weight].kind.shape(),
                    BandOp::Pass { .. } => None,
                };
                let each =
                    |s: kernels::layout::WeightShape| 2 * (b.output.pixels() * s.n * s.taps * s.k) as u64;
                b.ops.iter().filter_map(matrix).map(each).sum()
            }
            Op::Attention { shape: s, .. } => 4 * (s.batch * s.heads * s.nq * s.nk * s.d) as u64,
            _ => 0,
        }
    }
}

impl Op {
    /// Buffers read, buffers written (a workspace counts as written).
    pub(super) fn buffers(&self) -> (Vec<Buf>, Vec<Buf>) {
        let source = |s: &SourceBufs| s.iter().flatten().map(|r| r.buf).collect::<Vec<_>>();
        let norm = |n: &NormSpec| match n {
            NormSpec::Group { stats, .. } => Some(*stats),
            _ => None,
        };
        let (mut reads, mut writes) = (vec![], vec![]);
        match self {
            Op::Bands(b) => {
                for op in &b.ops {
                    match op {
                        BandOp::Pass { source: s, norm: n, out, .. } => {
                            reads.extend(source(s));
                            reads.extend(norm(n));
                            writes.push(out.buf);
                            writes.extend(out.scale);
                        }
                        BandOp::Gemm { image_bias, residual, out, .. } => {
                            reads.extend(*image_bias);
                            if let ResidualSpec::Rows(r) = residual {
                                reads.push(r.buf);
                            }
                            writes.push(out.buf);
                        }
                    }
                }
            }
            Op::GroupStats { source: s, stats, .. } => {
                reads = source(s);
                writes.push(*stats);
            }
            Op::Rows { source: s, norm: n, out, .. } => {
                reads = source(s);
                reads.extend(norm(n));
                writes.push(out.buf);
            }
            Op::Attention { q, k, v, workspace, out, .. } => {
                reads.extend([q.buf, k.buf, v.buf]);
                writes.extend([*workspace, out.buf]);
            }
            Op::Lookup { ids, out, .. } => {
                reads.push(*ids);
                writes.push(out.buf);
            }
            Op::Resize { x, out, .. } => {
                reads.push(x.buf);
                writes.push(out.buf);
            }
        }
        (reads, writes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bands(filter: Filter, border: Border, h: usize, batch: usize, rows: usize) -> Bands {
        let input = Dims { batch, h, w: 5 };
        let (oh, ow) = filter.output(&ImageShape { batch, h, w: 5, border });
        Bands {
            input,
            filter,
            border,
            output: Dims { batch, h: oh, w: ow },
            rows,
            ops: vec![],
            local: vec![],
        }
    }

    /// Every output row once, and each from exactly the input rows its filter reaches.
    #[test]
    fn bands_cover_the_output_and_windows_the_filter() {
        let one = Border { top: 1, left: 1, bottom: 1, right: 1 };
        let late = Border { top: 0, left: 0, bottom: 1, right: 1 };
        let conv = |stride, upsample| Filter { kh: 3, kw: 3, stride, upsample };
        let cases = [(Filter::POINT, Border::default()), (conv(1, false), one), (conv(2, false), one)];
        for (filter, border) in cases.into_iter().chain([(conv(2, false), late), (conv(1, true), one)]) {
            for h in [1usize, 2, 3, 7, 8, 16] {
                if h + border.top + border.bottom < filter.kh {
                    continue;
                }
                for rows in [1usize, 2, 3, 5, 8, 100] {
                    for batch in [1, 2, 3] {
                        let b = bands(filter, border, h, batch, rows);
                        let mut seen = vec![0; batch * b.output.h];
                        for band in b.bands() {
                            assert!(band.images == 1 || band.rows == b.output.h);
                            assert!(band.images * band.rows <= rows.max(b.output.h.min(rows)).max(1));
                            for i in band.image..band.image + band.images {
                                for y in band.y..band.y + band.rows {
                                    seen[i * b.output.h + y] += 1;
                                }
                            }
                            let win = b.window(band);
                            let (oh, _) = filter.output(&win.shape);
                            if filter.upsample {
                                assert!(win.skip + band.rows <= oh);
                                for y in band.y..band.y + band.rows {
                                    for tap in 0..3usize {
                                        // The doubled row it reads is inside the window or outside the image.
                                        let Some(d) = (y + tap).checked_sub(1).filter(|d| *d < 2 * h) else {
                                            continue;
                                        };
                                        assert!(d / 2 >= win.y && d / 2 < win.y + win.shape.h);
                                    }
                                }
                            } else {
                                assert_eq!(oh, band.rows);
                                let start = (band.y * filter.stride) as isize - border.top as isize;
                                assert_eq!(win.y as isize - win.shape.border.top as isize, start);
                                assert!(win.y + win.shape.h <= h);
                            }
                        }
                        assert!(seen.iter().all(|&n| n == 1), "{filter:?} {h} {rows} {batch}");
                    }
                }
            }
        }
    }
}
