//! A few channels 30 times wider than the rest, as trained networks have them, planted into the demo model.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

use convert::Quant;
use engine::format::ModelFile;
use engine::graph::weight::{Role, WeightKind};
use engine::graph::{Network, Origin};
use engine::models::{Part, networks};
use engine::pipeline::{Control, Pipeline, Request, Settings};
use engine::precision::Precision;
use kernels::gemm::Activation;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sdfast::compare::trajectory::{self, Trajectory};
use sdfast_tests::{demo, median, model, report};

/// How much wider.
const WIDE: f32 = 30.0;
/// Every which channel.
const EVERY: usize = 24;
/// How much more error is allowed than the plain model's.
const MORE: f64 = 1.5;

/// The UNet's tensors in f32, by the names that diffusers uses.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What is planted.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plant {
    /// Wide inputs, made up for in the norm or the matrix before: the picture stays.
    Inputs,
    /// Narrow inputs, made up for before, so that activations are wide: the picture stays.
    Activations,
    /// Wide inputs and nothing else.
    InputsAlone,
    /// Wide outputs and nothing else.
    OutputsAlone,
}

fn unet() -> Tensors {
    let bytes = std::fs::read(demo().join("model/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |t: &TensorView<'_>| -> Vec<f32> {
        match t.dtype() {
            Dtype::F32 => t.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => {
                t.data().as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
            }
            other => panic!("{other:?}"),
        }
    };
    file.iter().map(|(name, t)| (name.to_owned(), (t.shape().to_vec(), read(&t)))).collect()
}

/// Multiplies the weights of some inputs (`axis` 1) or outputs (0) by `factor`; the others are those of channels that aren't
/// `chosen`.
fn widen(tensors: &mut Tensors, name: &str, axis: usize, factor: f32, chosen: impl Fn(usize) -> bool) {
    let (shape, values) =
        tensors.get_mut(name.strip_prefix("unet.").unwrap()).unwrap_or_else(|| panic!("{name}"));
    let inner: usize = shape[axis + 1..].iter().product();
    let n = shape[axis];
    for (i, x) in values.iter_mut().enumerate() {
        if chosen(i / inner % n) {
            *x *= factor;
        }
    }
}

/// Plants in operands of matrices that are rounded to 8 or 4 bits; returns how many.
fn plant(tensors: &mut Tensors, network: &Network, plant: Plant) -> usize {
    let specs = network.weights();
    let mut planted = 0;
    for (o, operand) in network.operands().into_iter().enumerate() {
        let first = &specs[operand.matrices[0]];
        let WeightKind::Matrix { k, .. } = first.kind else { panic!("{} is a matrix", first.name) };
        let kept = [Role::ConvIn, Role::ConvOut, Role::Embedding, Role::Shortcut].contains(&first.role);
        // Scores of attention that are 900 times larger make a network whose predictions depend on nothing but rounding.
        let scores = [Role::SelfQkv, Role::CrossQ, Role::CrossKv].contains(&first.role);
        let alone = [Plant::InputsAlone, Plant::OutputsAlone].contains(&plant);
        if k < 2 * EVERY || kept || scores && alone {
            continue;
        }
        let chosen = |c: usize| c % EVERY == o % EVERY;
        let name = |w: usize| specs[w].name.as_str();
        let factor = if plant == Plant::Activations { 1.0 / WIDE } else { WIDE };
        if matches!(plant, Plant::Inputs | Plant::Activations) {
            // Behind a function that isn't linear nothing makes up for a width.
            match operand.origin {
                Origin::Norm { gamma, beta, activation: Activation::None } => {
                    for w in [gamma, beta] {
                        widen(tensors, name(w), 0, 1.0 / factor, chosen);
                    }
                }
                Origin::Matrix { weight, bias, activation: Activation::None | Activation::Geglu } => {
                    for w in [Some(weight), bias].into_iter().flatten() {
                        widen(tensors, name(w), 0, 1.0 / factor, |c| c < k && chosen(c));
                    }
                }
                _ => continue,
            }
        }
        planted += 1;
        for &w in &operand.matrices {
            match plant {
                Plant::OutputsAlone => widen(tensors, name(w), 0, factor, chosen),
                _ => widen(tensors, name(w), 1, factor, chosen),
            }
        }
    }
    planted
}

/// The demo model with other numbers in its UNet, as a folder of diffusers.
fn write(folder: &Path, tensors: &Tensors) {
    for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        for file in std::fs::read_dir(demo().join("model").join(part)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(part).join(file.file_name())).unwrap();
        }
    }
    std::fs::copy(demo().join("model/model_index.json"), folder.join("model_index.json")).unwrap();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, x))| {
            (name.clone(), shape.clone(), x.iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let out = folder.join("unet/diffusion_pytorch_model.safetensors");
    std::fs::write(out, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The UNet with what a conversion makes of its matrices, in f32.
fn rounded(quant: Quant) -> Tensors {
    let file = model(&demo().join("model"), quant);
    let mut tensors = unet();
    for tensor in file.tensors() {
        let (Some(name), WeightKind::Matrix { n, kh, kw, k, order }) =
            (tensor.name.strip_prefix("unet."), tensor.kind)
        else {
            continue;
        };
        let shape = tensor.kind.shape().unwrap();
        let stored = kernels::quantize::decode(tensor.encoding, shape, file.bytes(tensor));
        let (_, values) = tensors.get_mut(name).unwrap();
        for (row, stored) in stored.chunks_exact(kh * kw * k).enumerate() {
            let Some(row) = order.source(n, row) else { continue };
            for (i, x) in stored.iter().enumerate() {
                values[(row * k + i % k) * kh * kw + i / k] = *x; // taps innermost
            }
        }
    }
    tensors
}

fn pipeline(file: ModelFile, precision: Precision) -> Pipeline {
    Pipeline::new(file, Settings { precision, ..Settings::default() }).unwrap()
}

/// The exact run of the model of a checkpoint.
struct Exact {
    request: Request,
    run: Trajectory,
}

impl Exact {
    fn new(checkpoint: &Path) -> Exact {
        let pipeline = pipeline(model(checkpoint, Quant::F16), Precision::Exact);
        let request =
            Request { seed: 3, ..Request::new("a red circle on a blue background", pipeline.card()) };
        let run = trajectory::run(&pipeline, &request, &|| Control::Continue).unwrap();
        Exact { request, run }
    }

    /// The median error of a noise prediction along it.
    fn error(&self, checkpoint: &Path, (quant, precision): (Quant, Precision)) -> f64 {
        let pipeline = pipeline(model(checkpoint, quant), precision);
        median(&trajectory::errors(&pipeline, &self.request, &self.run, 2, &|| Control::Continue).unwrap())
    }
}

fn network() -> Network {
    let card = model(&demo().join("model"), Quant::F16).card().clone();
    networks(&card).into_iter().find(|(part, _)| *part == Part::Unet).unwrap().1
}

/// What makes the same picture is as exact as it was.
#[test]
fn wide_channels_that_are_made_up_for_cost_nothing() {
    const KINDS: [(Quant, Precision); 4] = [
        (Quant::Q8, Precision::Fast),
        (Quant::Q8, Precision::High),
        (Quant::Q8, Precision::Exact),
        (Quant::Q4, Precision::Fast),
    ];
    let network = network();
    let plain = demo().join("model");
    let exact = Exact::new(&plain);
    let plain = KINDS.map(|kind| exact.error(&plain, kind));
    for what in [Plant::Inputs, Plant::Activations] {
        let mut tensors = unet();
        let operands = plant(&mut tensors, &network, what);
        assert!(operands > 20);
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &tensors);
        for ((quant, precision), plain) in KINDS.into_iter().zip(plain) {
            let got = exact.error(folder.path(), (quant, precision));
            let name = quant.name();
            report(&format!(
                "{what:?} in {operands} operands, {name} {precision}: {got:.4}, plain {plain:.4}"
            ));
            assert!(got <= MORE * plain);
        }
    }
}

/// What changes the network changes how it takes errors of rounding, too. So these are compared with the errors that rounding
/// the weights of the plain network and planting after that makes, and what 8-bit activations add to these there.
#[test]
fn wide_channels_cost_little_more_than_others() {
    const KINDS: [(Quant, Precision); 2] = [(Quant::Q8, Precision::Fast), (Quant::Q4, Precision::Fast)];
    let network = network();
    let rounded = KINDS.map(|(quant, _)| rounded(quant));
    let ratios = |what: Option<Plant>| {
        let made = |tensors: &Tensors| {
            let mut tensors = tensors.clone();
            let operands = what.map_or(0, |what| plant(&mut tensors, &network, what));
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &tensors);
            (folder, operands)
        };
        let (planted, operands) = made(&unet());
        let exact = Exact::new(planted.path());
        let each = rounded.iter().zip(KINDS).map(|(rounded, kind)| {
            let ideal = exact.error(made(rounded).0.path(), (Quant::F16, Precision::Exact));
            let got = exact.error(planted.path(), kind);
            let name = kind.0.name();
            report(&format!(
                "{what:?} in {operands} operands, {name} fast: {got:.4}, after rounding {ideal:.4}"
            ));
            got / ideal
        });
        each.collect::<Vec<f64>>()
    };
    let plain = ratios(None);
    for what in [Plant::InputsAlone, Plant::OutputsAlone] {
        for (got, plain) in ratios(Some(what)).into_iter().zip(&plain) {
            assert!(got <= MORE * plain, "{what:?}: {got} for {plain}");
        }
    }
}
