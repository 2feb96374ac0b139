//! Runs a plan.

use std::ops::Range;
use std::time::Instant;

use kernels::attention::{Attention, Mask, attention};
use kernels::gemm::{Epilogue, Filter, Gemm, gemm_rows};
use kernels::layout::Weight;
use kernels::par::Shared;
use kernels::pass::{
    Norm, Recipe, Source, group_codings, group_finish, group_stats, group_sums, operand_pass, range_codings,
    rows_pass, stats_len, sums_len,
};
use kernels::view::{Border, Coding, ImageShape, Operand, OperandMut, Rows, RowsMut};
use kernels::{Isa, Workers, bf16, f16};

use super::arena::Arena;
use super::bands::{Band, BandOp, Bands, Extent};
use super::network::{Dims, Rate};
use super::plan::Plan;
use super::profile::Profile;
use super::steps::{
    Buf, NormSpec, Op, OperandBuf, OperandKind, ResidualSpec, RowsBuf, RowsKind, SourceBufs, Step,
};

/// What goes on around steps.
pub trait Watch<E> {
    /// Step `i` is about to run; steps `among` follow each other.
    fn before(&mut self, i: usize, among: Range<usize>);

    /// Step `i` is done. An error ends the run.
    fn after(&mut self, i: usize, among: Range<usize>) -> Result<(), E>;
}

/// A matrix product that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The weight's name.
    pub name: &'a str,
    /// The rows that meet it, multiplied by its factors. Those around the border of an image are zero.
    pub operand: Operand<'a>,
    /// Elements from one row to the next.
    pub stride: usize,
    /// The rows' pixels: a band of those of the layer, perhaps.
    pub input: ImageShape,
    /// What is computed of them.
    pub filter: Filter,
}

/// Is shown each matrix product.
pub struct Observer(Box<See>);

type See = dyn Fn(Seen<'_>) + Send + Sync;

impl Observer {
    /// Calls `see`.
    pub fn new(see: impl Fn(Seen<'_>) + Send + Sync + 'static) -> Self {
        Observer(Box::new(see))
    }
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observer")
    }
}

/// A plan, the bytes of its weights, and the memory it runs in.
pub struct Session<'a> {
    plan: &'a Plan,
    weights: Vec<&'a [u8]>,
    arena: &'a mut Arena,
    banks: usize,
    /// The one at hand, of those that the last [`Session::schedule`] was for.
    timestep: usize,
    workers: &'a Workers,
    isa: Isa,
    observer: Option<&'a Observer>,
    profile: Option<&'a Profile>,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({} steps, {} banks)", self.plan.steps(Rate::Step).len(), self.banks)
    }
}

impl<'a> Session<'a> {
    /// A run of `plan` with `weights` as stored, one for each of [`Plan::weights`], in `arena`.
    ///
    /// # Panics
    /// Where a weight is not as long as the plan says, or the arena is too small.
    pub fn new(
        plan: &'a Plan,
        weights: Vec<&'a [u8]>,
        arena: &'a mut Arena,
        banks: usize,
        workers: &'a Workers,
        isa: Isa,
    ) -> Self {
        assert_eq!(weights.len(), plan.weights().len(), "bytes for each weight");
        for (i, w) in weights.iter().enumerate() {
            assert_eq!(w.len(), plan.stored_bytes(i), "bytes of {}", plan.weights()[i].name);
        }
        assert!(plan.arena_bytes(banks) <= arena.bytes(), "an arena of {} bytes", arena.bytes());
        Session { plan, weights, arena, banks, timestep: 0, workers, isa, profile: None, observer: None }
    }

    /// Shows operands to `observer`.
    pub fn observed(self, observer: Option<&'a Observer>) -> Self {
        Session { observer, ..self }
    }

    /// The same, with a note of each operation in `profile`.
    pub fn profiled(self, profile: Option<&'a Profile>) -> Self {
        Session { profile, ..self }
    }

    /// Where the caller writes input `name` of f32 numbers. Inputs of rate `Run` are written before [`Session::prologue`],
    /// those of rate `Schedule` before [`Session::schedule`], those of rate `Step` before each [`Session::pass`].
    ///
    /// # Panics
    /// Where the network has no such input.
    pub fn input(&mut self, name: &str, bank: usize) -> &mut [f32] {
        let rows = self.plan.input(name).unwrap_or_else(|| panic!("the network has an input {name}"));
        assert_eq!(rows.kind, RowsKind::F32, "{name}");
        let region = self.plan.region(rows.buf, bank, self.banks);
        // SAFETY: `self` is borrowed mutably, so no step runs and no other slice of the arena lives.
        unsafe { self.arena.slice_mut(region) }
    }

    /// Where the caller writes token ids.
    ///
    /// # Panics
    /// Where the network has no such input.
    pub fn ids(&mut self, name: &str) -> &mut [u32] {
        let rows = self.plan.input(name).unwrap_or_else(|| panic!("the network has an input {name}"));
        assert_eq!(rows.kind, RowsKind::U32, "{name}");
        let region = self.plan.region(rows.buf, 0, self.banks);
        // SAFETY: as in `input`.
        unsafe { self.arena.slice_mut(region) }
    }

    /// Output `name` after a pass.
    ///
    /// # Panics
    /// Where the network has no such output.
    pub fn output(&self, name: &str) -> &[f32] {
        let rows = self.plan.output(name).unwrap_or_else(|| panic!("the network has an output {name}"));
        // SAFETY: `self` is borrowed, so nothing writes.
        unsafe { self.arena.slice(self.plan.region(rows.buf, 0, self.banks)) }
    }

    /// Runs what depends on inputs of rate `Run` alone.
    pub fn prologue<E>(&mut self, bank: usize, watch: &mut impl Watch<E>) -> Result<(), E> {
        self.run(self.plan.steps(Rate::Run), bank, watch)
    }

    /// Runs what depends on inputs of rate `Schedule` too: for all timesteps that these hold.
    pub fn schedule<E>(&mut self, bank: usize, watch: &mut impl Watch<E>) -> Result<(), E> {
        self.run(self.plan.steps(Rate::Schedule), bank, watch)
    }

    /// Runs the steps of one pass, at timestep number `timestep` of those of [`Session::schedule`].
    pub fn pass<E>(&mut self, bank: usize, timestep: usize, watch: &mut impl Watch<E>) -> Result<(), E> {
        self.timestep = timestep;
        self.run(self.plan.steps(Rate::Step), bank, watch)
    }

    fn run<E>(&mut self, steps: Range<usize>, bank: usize, watch: &mut impl Watch<E>) -> Result<(), E> {
        for i in steps.clone() {
            watch.before(i, steps.clone());
            self.step(&self.plan.all_steps()[i], bank);
            watch.after(i, steps.clone())?;
        }
        Ok(())
    }

    fn vector(&self, weight: usize) -> &[f32] {
        bytemuck::cast_slice(self.weights[weight])
    }

    fn read<T: bytemuck::Pod>(&self, buf: Buf, bank: usize) -> &[T] {
        // SAFETY: a plan gives the buffers that a step writes places apart from those it reads, and steps run one by one.
        unsafe { self.arena.slice(self.plan.region(buf, bank, self.banks)) }
    }

    #[allow(clippy::mut_from_ref)]
    fn write<T: bytemuck::Pod>(&self, buf: Buf, bank: usize) -> &mut [T] {
        // SAFETY: as in `read`; each buffer that a kernel call writes is taken once.
        unsafe { self.arena.slice_mut(self.plan.region(buf, bank, self.banks)) }
    }

    /// Pixels `at` of `r`.
    fn rows(&self, r: RowsBuf, bank: usize, at: Range<usize>) -> Rows<'_> {
        let at = at.start * r.c..at.end * r.c;
        match r.kind {
            RowsKind::F32 => Rows::F32(&self.read(r.buf, bank)[at]),
            RowsKind::Bf16 => Rows::Bf16(&self.read(r.buf, bank)[at]),
            RowsKind::U32 => unreachable!("ids are read by lookups alone"),
        }
    }

    /// Pixels `at` of `r`, to be written.
    fn rows_mut(&self, r: RowsBuf, bank: usize, at: Range<usize>) -> RowsMut<'_> {
        let at = at.start * r.c..at.end * r.c;
        match r.kind {
            RowsKind::F32 => RowsMut::F32(&mut self.write(r.buf, bank)[at]),
            RowsKind::Bf16 => RowsMut::Bf16(&mut self.write(r.buf, bank)[at]),
            RowsKind::U32 => unreachable!("ids are written by the caller alone"),
        }
    }

    fn source(&self, s: SourceBufs, bank: usize, at: Range<usize>) -> Source<'_> {
        Source { parts: s.map(|r| r.map(|r| (self.rows(r, bank, at.clone()), r.c))) }
    }

    fn operand(&self, o: OperandBuf, bank: usize, image: &ImageShape) -> Operand<'_> {
        let rows = image.operand_rows();
        let len = rows * o.stride;
        match (o.kind, o.scale) {
            (OperandKind::U8, Some(scale)) => {
                let codes = &self.read(o.buf, bank)[..len];
                match o.uniform {
                    true => Operand::U8Uniform { codes, images: &self.read(scale, bank)[..image.batch] },
                    false => Operand::U8 { codes, scale: &self.read(scale, bank)[..rows] },
                }
            }
            (OperandKind::U8, None) => unreachable!("8-bit rows have scales"),
            (OperandKind::Bf16, _) => Operand::Bf16(&self.read(o.buf, bank)[..len]),
            (OperandKind::F32, _) => Operand::F32(&self.read(o.buf, bank)[..len]),
        }
    }

    /// Where a pass writes: what `image` takes, from row `first` of the operand on. `codings` makes those of images, where
    /// these have them.
    fn operand_mut(
        &self,
        o: OperandBuf,
        bank: usize,
        first: usize,
        image: &ImageShape,
        codings: impl FnOnce(&mut [Coding]),
    ) -> OperandMut<'_> {
        let rows = first..first + image.operand_rows();
        let elements = rows.start * o.stride..rows.end * o.stride;
        match (o.kind, o.scale) {
            (OperandKind::U8, Some(scale)) if o.uniform => {
                let images = &mut self.write(scale, bank)[..image.batch];
                codings(images);
                OperandMut::U8Uniform { codes: &mut self.write(o.buf, bank)[elements], images }
            }
            (OperandKind::U8, Some(scale)) => OperandMut::U8 {
                codes: &mut self.write(o.buf, bank)[elements],
                scale: &mut self.write(scale, bank)[rows],
            },
            (OperandKind::U8, None) => unreachable!("8-bit rows have scales"),
            (OperandKind::Bf16, _) => OperandMut::Bf16(&mut self.write(o.buf, bank)[elements]),
            (OperandKind::F32, _) => OperandMut::F32(&mut self.write(o.buf, bank)[elements]),
        }
    }

    /// The norm for images `images`.
    fn norm(&self, norm: NormSpec, bank: usize, images: Range<usize>) -> Norm<'_> {
        match norm {
            NormSpec::None | NormSpec::Range { .. } => Norm::None,
            NormSpec::Group { stats, groups, gamma, beta } => {
                let (gamma, beta) = (self.vector(gamma), self.vector(beta));
                let each = stats_len(groups, gamma.len());
                let stats = &self.read(stats, bank)[images.start * each..images.end * each];
                Norm::Group { stats, groups, gamma, beta }
            }
            NormSpec::Layer { gamma, beta, eps } => {
                Norm::Layer { gamma: self.vector(gamma), beta: self.vector(beta), eps }
            }
        }
    }

    /// All operations of `bands` on one band.
    fn band(&self, path: &str, bands: &Bands, band: &Band, bank: usize) {
        let (workers, isa) = (self.workers, self.isa);
        let images = band.image..band.image + band.images;
        // Pixels of rows `at` of images `dims`, in a whole tensor or in what the band holds of one.
        let pixels = |r: RowsBuf, dims: Dims, at: &Range<usize>| {
            let (image, held) = match bands.local(r) {
                Some(i) => (0, band.local[i].clone()),
                None => (band.image, 0..dims.h),
            };
            let first = (image * held.len() + at.start - held.start) * dims.w;
            first..first + band.images * at.len() * dims.w
        };
        for m in &band.moves {
            self.write::<u8>(m.buf, bank).copy_within(m.from..m.from + m.bytes, m.to);
        }
        for (op, extent) in bands.ops.iter().zip(&band.ops) {
            let Extent { rows, operand: shape, skip, .. } = extent;
            let clock = self.profile.map(|profile| (profile, Instant::now()));
            match *op {
                BandOp::Pass { .. } if extent.written().0.operand_rows() == 0 => {}
                BandOp::Pass { source, input, norm, activation, factors, out, .. } => {
                    let part = |r: RowsBuf| (self.rows(r, bank, pixels(r, input, rows)), r.c);
                    let source = Source { parts: source.map(|r| r.map(part)) };
                    let ranges = match norm {
                        NormSpec::Range { stats } => {
                            let each = stats_len(1, source.columns());
                            &self.read(stats, bank)[images.start * each..images.end * each]
                        }
                        _ => &[],
                    };
                    let norm = self.norm(norm, bank, images.clone());
                    let recipe = Recipe { norm, activation, factors: factors.map(|f| self.vector(f)) };
                    let (shape, first) = extent.written();
                    let operand = self.operand_mut(out, bank, first, &shape, |images| match norm {
                        Norm::Group { .. } => group_codings(recipe, images),
                        _ => range_codings(ranges, source.columns(), recipe.factors, images),
                    });
                    operand_pass(workers, isa, source, shape, recipe, operand, out.stride);
                }
                BandOp::Gemm { .. } | BandOp::Sums { .. } if rows.is_empty() => {}
                BandOp::Gemm { operand, weight, bias, image_bias, activation, residual, out } => {
                    let filter = self.filter(bands, operand);
                    let weight_shape = self.plan.weights()[weight].kind.shape().expect("a GEMM has a matrix");
                    let encoding = self.plan.encodings()[weight].expect("a matrix has an encoding");
                    let n = weight_shape.n;
                    let at = bands.dims(out);
                    let epilogue = Epilogue {
                        bias: bias.map(|b| self.vector(b)),
                        image_bias: image_bias.map(|b| &self.read(b, bank)[images.start * n..images.end * n]),
                        activation,
                        residual: match residual {
                            ResidualSpec::Rows(r) => Some(self.rows(r, bank, pixels(r, at, rows))),
                            ResidualSpec::None | ResidualSpec::InPlace => None,
                        },
                        accumulate: matches!(residual, ResidualSpec::InPlace),
                    };
                    if let Some(Observer(see)) = self.observer {
                        see(Seen {
                            name: &self.plan.weights()[weight].name,
                            operand: self.operand(operand, bank, shape),
                            stride: operand.stride,
                            input: *shape,
                            filter,
                        });
                    }
                    let call = Gemm {
                        operand: self.operand(operand, bank, shape),
                        input: *shape,
                        filter,
                        weight: Weight::new(encoding, weight_shape, self.weights[weight]),
                        epilogue,
                        out: self.rows_mut(out, bank, pixels(out, at, rows)),
                    };
                    gemm_rows(workers, isa, call, *skip..*skip + rows.len(), rows.start);
                }
                BandOp::Sums { source, groups, sums } => {
                    let part = |r: RowsBuf| (self.rows(r, bank, pixels(r, bands.output, rows)), r.c);
                    let source = Source { parts: source.map(|r| r.map(part)) };
                    let Dims { h, w, .. } = bands.output;
                    let image = ImageShape { batch: band.images, h, w, border: Border::default() };
                    let each = sums_len(&ImageShape { batch: 1, ..image }, groups, source.columns());
                    let sums = &mut self.write(sums, bank)[images.start * each..images.end * each];
                    group_sums(workers, isa, source, image, groups, rows.clone(), sums);
                }
            }
            if let Some((profile, since)) = clock {
                let work = bands.work(op, band, extent, self.plan);
                profile.add(path, work.kind, since, work.operations, work.bytes);
            }
        }
    }

    /// The filter of the pass that writes `operand`.
    fn filter(&self, bands: &Bands, operand: OperandBuf) -> Filter {
        let of = |op: &BandOp| match op {
            BandOp::Pass { filter, out, .. } if out.buf == operand.buf => Some(*filter),
            _ => None,
        };
        bands.ops.iter().find_map(of).expect("an operand is written before it is read")
    }

    fn step(&self, step: &Step, bank: usize) {
        let (workers, isa) = (self.workers, self.isa);
        let all = |r: RowsBuf, pixels: usize| self.rows(r, bank, 0..pixels);
        if let Op::Bands(bands) = &step.op {
            let mut last = None;
            while let Some(band) = bands.next(last.as_ref()) {
                self.band(&step.path, bands, &band, bank);
                last = Some(band);
            }
            return;
        }
        let clock = self.profile.map(|profile| (profile, Instant::now()));
        match step.op {
            Op::Bands(_) => unreachable!("bands are run above"),
            Op::GroupStats { source, image, groups, eps, sums, stats } => {
                let source = self.source(source, bank, 0..image.pixels());
                let (sums, stats) = (self.write(sums, bank), self.write(stats, bank));
                group_stats(workers, isa, source, image, groups, eps, sums, stats);
            }
            Op::GroupFinish { sums, image, channels, groups, eps, stats } => {
                group_finish(image, channels, groups, eps, self.read(sums, bank), self.write(stats, bank));
            }
            Op::Rows { source, image, norm, activation, out } => {
                let source = self.source(source, bank, 0..image.pixels());
                let norm = self.norm(norm, bank, 0..image.batch);
                let out = self.rows_mut(out, bank, 0..image.pixels());
                rows_pass(workers, isa, source, image, Recipe::new(norm, activation), out);
            }
            Op::Attention { shape, q, k, v, causal, products, workspace, out } => {
                let call = Attention {
                    shape,
                    q: all(q, shape.batch * shape.nq),
                    q_stride: q.c,
                    k: all(k, shape.batch * shape.nk),
                    v: all(v, shape.batch * shape.nk),
                    kv_stride: k.c,
                    scale: 1.0 / (shape.d as f32).sqrt(),
                    mask: if causal { Mask::Causal } else { Mask::None },
                    products,
                    out: self.rows_mut(out, bank, 0..shape.batch * shape.nq),
                };
                attention(workers, isa, call, self.write(workspace, bank));
            }
            Op::Lookup { ids, table, positions, out } => {
                let c = out.c;
                let ids: &[u32] = self.read(ids, bank);
                let table: &[f16] = bytemuck::cast_slice(self.weights[table]);
                let positions: &[f16] = bytemuck::cast_slice(self.weights[positions]);
                let tokens = positions.len() / c;
                let out: &mut [f32] = self.write(out.buf, bank);
                for (i, (row, &id)) in out.chunks_exact_mut(c).zip(ids).enumerate() {
                    let word = &table[id as usize * c..][..c];
                    let place = &positions[i % tokens * c..][..c];
                    for ((y, a), b) in row.iter_mut().zip(word).zip(place) {
                        *y = a.to_f32() + b.to_f32();
                    }
                }
            }
            Op::AtTimestep { x, from, batch, out } => {
                let (rows, out) = (self.read::<f32>(x.buf, bank), self.write::<f32>(out.buf, bank));
                for (image, out) in out.chunks_exact_mut(x.c).take(batch).enumerate() {
                    out.copy_from_slice(&rows[(image % from.batch * from.w + self.timestep) * x.c..][..x.c]);
                }
            }
            Op::Resize { x, from, to, out } => match x.kind {
                RowsKind::F32 => {
                    resize::<f32>(workers, self.read(x.buf, bank), from, self.write(out.buf, bank), to, x.c);
                }
                RowsKind::Bf16 => {
                    resize::<bf16>(workers, self.read(x.buf, bank), from, self.write(out.buf, bank), to, x.c);
                }
                RowsKind::U32 => unreachable!("ids are no image"),
            },
        }
        if let Some((profile, since)) = clock {
            let operations = step.operations(self.plan.weights());
            profile.add(&step.path, step.kind(), since, operations, step.op.bytes());
        }
    }
}

/// Nearest neighbour: each side of `to` is that of `from` or twice as long, less a last row or column; images are those of
/// `from` over and over.
fn resize<T: Copy + Send + Sync>(
    workers: &Workers,
    x: &[T],
    from: super::Dims,
    out: &mut [T],
    to: super::Dims,
    c: usize,
) {
    let half = |at: usize, from: usize, to: usize| if from == to { at } else { at / 2 };
    let out = Shared::new(&mut out[..to.pixels() * c]);
    workers.for_each(to.batch * to.h, |row, _| {
        let (image, y) = (row / to.h % from.batch, half(row % to.h, from.h, to.h));
        let line = &x[(image * from.h + y) * from.w * c..][..from.w * c];
        // SAFETY: each task has a row of its own.
        let out = unsafe { out.slice(row * to.w * c, to.w * c) };
        if from.w == to.w {
            return out.copy_from_slice(line);
        }
        for (x, pixel) in out.chunks_exact_mut(c).enumerate() {
            pixel.copy_from_slice(&line[x / 2 * c..][..c]);
        }
    });
}
