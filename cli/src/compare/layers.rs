//! What each matrix product adds to the error on its own: given the exact inputs that an exact run meets, with the weights and
//! the operand of another model at its precision.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use engine::error::Result;
use engine::format::ModelFile;
use engine::graph::{Observer, Seen};
use engine::pipeline::{Pipeline, Request};
use kernels::gemm::{Activation, Epilogue, Gemm, gemm};
use kernels::pass::{Norm, Recipe, Source, group_stats, operand_pass, range_codings, stats_len, sums_len};
use kernels::view::{Border, Coding, ImageShape, Operand, OperandMut, Rows, RowsMut};
use kernels::{Isa, Workers, bf16};

use super::trajectory::{self, GoOn, Trajectory};

/// Evaluations along the run that are looked at.
const EVALUATIONS: usize = 3;

/// How an operand is held.
#[derive(Clone, Copy, Debug)]
enum Form {
    F32,
    Bf16,
    U8,
    U8Uniform,
}

impl Form {
    fn of(operand: &Operand<'_>) -> Form {
        match operand {
            Operand::F32(_) => Form::F32,
            Operand::Bf16(_) => Form::Bf16,
            Operand::U8 { .. } => Form::U8,
            Operand::U8Uniform { .. } => Form::U8Uniform,
        }
    }
}

/// Sums of squares of errors, and of what is right, by layer.
type Sums = BTreeMap<String, [f64; 2]>;

/// The relative error of each product of `tested`, the largest first, for inputs along a run of the exact `reference`.
pub(super) fn errors(
    reference: Pipeline,
    tested: Pipeline,
    request: &Request,
    along: &Trajectory,
    go_on: GoOn<'_>,
) -> Result<Vec<(String, f64)>> {
    let stride = along.inputs.len().div_ceil(EVALUATIONS);
    let files = [&reference, &tested].map(|p| p.file().path().map(ModelFile::open).transpose());
    let [reference_file, tested_file] = files;
    let files = [reference_file?, tested_file?].map(|file| file.expect("models that are compared are files"));

    // One evaluation tells the forms.
    let forms: Arc<Mutex<HashMap<String, Form>>> = Arc::default();
    let seen = Arc::clone(&forms);
    let tested = tested.observed(Observer::new(move |s: Seen<'_>| {
        locked(&seen).insert(s.name.to_owned(), Form::of(&s.operand));
    }));
    trajectory::errors(&tested, request, along, along.inputs.len(), go_on)?;

    let forms = std::mem::take(&mut *locked(&forms));
    let bench =
        Bench { workers: Workers::new(tested.settings().threads), isa: tested.settings().isa, files, forms };
    let sums: Arc<Mutex<Sums>> = Arc::default();
    let seen = Arc::clone(&sums);
    let reference = reference.observed(Observer::new(move |s: Seen<'_>| {
        let [error, right] = bench.compare(&s);
        let name = s.name.strip_suffix(".weight").unwrap_or(s.name);
        let mut sums = locked(&seen);
        let sums = sums.entry(name.to_owned()).or_default();
        (sums[0], sums[1]) = (sums[0] + error, sums[1] + right);
    }));
    trajectory::errors(&reference, request, along, stride, go_on)?;
    let sums = std::mem::take(&mut *locked(&sums));
    let relative = |[error, right]: [f64; 2]| (error / right.max(f64::MIN_POSITIVE)).sqrt();
    let mut errors: Vec<_> = sums.into_iter().map(|(name, sums)| (name, relative(sums))).collect();
    errors.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(errors)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics with it")
}

/// Computes products both ways.
struct Bench {
    workers: Workers,
    isa: Isa,
    /// The reference, the tested.
    files: [ModelFile; 2],
    /// Forms of the tested operands, by weight.
    forms: HashMap<String, Form>,
}

impl Bench {
    /// Sums of squares of the tested product's error and of the exact product.
    fn compare(&self, seen: &Seen<'_>) -> [f64; 2] {
        let Operand::F32(x) = seen.operand else { unreachable!("exact operands are f32") };
        let [reference, tested] = &self.files;
        let tensors = [reference, tested].map(|f| f.tensor(seen.name).expect("models of one kind"));
        let factors = [reference.factors(tensors[0]), tested.factors(tensors[1])];
        let k = tensors[0].kind.shape().expect("products have matrices").k;
        let factor = |which: usize, i: usize| factors[which].map_or(1.0, |f| f[i]);
        let factors: Vec<f32> = (0..k).map(|i| factor(1, i) / factor(0, i)).collect();

        let want = self.product(reference, seen, seen.operand);
        let n = seen.input.operand_rows();
        let mut codes = vec![0u8; n * seen.stride];
        let (mut scale, mut images) = (vec![0.0; n], vec![Coding::default(); seen.input.batch]);
        let (mut narrow, mut wide) = (vec![], vec![]);
        let inner = interior(x, k, seen);
        let source = Source::one(Rows::F32(&inner), k);
        let pass = |out: OperandMut<'_>| {
            let recipe = Recipe { factors: Some(&factors), ..Recipe::new(Norm::None, Activation::None) };
            operand_pass(&self.workers, self.isa, source, seen.input, recipe, out, seen.stride);
        };
        let operand = match self.forms.get(seen.name).copied().unwrap_or(Form::F32) {
            Form::U8 => {
                pass(OperandMut::U8 { codes: &mut codes, scale: &mut scale });
                Operand::U8 { codes: &codes, scale: &scale }
            }
            Form::U8Uniform => {
                let image = ImageShape { border: Border::default(), ..seen.input };
                let mut sums = vec![0.0; sums_len(&image, 1, k)];
                let mut stats = vec![0.0; image.batch * stats_len(1, k)];
                group_stats(&self.workers, self.isa, source, image, 1, 1.0, &mut sums, &mut stats);
                range_codings(&stats, k, Some(&factors), &mut images);
                pass(OperandMut::U8Uniform { codes: &mut codes, images: &images });
                Operand::U8Uniform { codes: &codes, images: &images }
            }
            Form::Bf16 => {
                narrow.resize(n * seen.stride, bf16::ZERO);
                pass(OperandMut::Bf16(&mut narrow));
                Operand::Bf16(&narrow)
            }
            Form::F32 => {
                wide.resize(n * seen.stride, 0.0);
                pass(OperandMut::F32(&mut wide));
                Operand::F32(&wide)
            }
        };
        let got = self.product(tested, seen, operand);
        let square = |x: f32| f64::from(x).powi(2);
        let error = got.iter().zip(&want).map(|(g, w)| square(g - w)).sum();
        [error, want.iter().map(|&w| square(w)).sum()]
    }

    /// The product of `operand` and the weight of `file`.
    fn product(&self, file: &ModelFile, seen: &Seen<'_>, operand: Operand<'_>) -> Vec<f32> {
        let tensor = file.tensor(seen.name).expect("models of one kind");
        let weight = file.weight(tensor).expect("products have matrices");
        let (h, w) = seen.filter.output(&seen.input);
        let mut out = vec![0.0; seen.input.batch * h * w * weight.shape.n];
        let (input, filter, epilogue) = (seen.input, seen.filter, Epilogue::default());
        gemm(
            &self.workers,
            self.isa,
            Gemm { operand, input, filter, weight, epilogue, out: RowsMut::F32(&mut out) },
        );
        out
    }
}

/// The pixels without border and slack, `[pixels, k]`.
fn interior(x: &[f32], k: usize, seen: &Seen<'_>) -> Vec<f32> {
    let image = seen.input;
    let mut out = Vec::with_capacity(image.pixels() * k);
    for b in 0..image.batch {
        for y in 0..image.h {
            let line = (b * image.full_h() + image.border.top + y) * image.full_w() + image.border.left;
            for x in x[line * seen.stride..].chunks_exact(seen.stride).take(image.w) {
                out.extend_from_slice(&x[..k]);
            }
        }
    }
    out
}
