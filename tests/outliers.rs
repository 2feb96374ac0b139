//! A few channels 30 times wider than the rest, as trained networks have them, planted into the demo model.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use convert::{Options, Quant};
use engine::format::ModelFile;
use engine::graph::{Network, Origin};
use engine::graph::weight::{Role, WeightKind};
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
            Dtype::F16 => t.data().as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            other => panic!("{other:?}"),
        }
    };
    file.iter().map(|(name, t)| (name.to_owned(), (t.shape().to_vec(), read(&t)))).collect()
}

/// Multiplies the weights of some inputs (`axis` 1) or outputs (0) by `factor`; the others are those of channels that aren't
/// `chosen`.
fn widen(tensors: &mut Tensors, name: &str, axis: usize, factor: f32, chosen: impl Fn(usize) -> bool) {
    let (shape, values) = tensors.get_mut(name.strip_prefix("unet.").unwrap()).unwrap_or_else(|| panic!("{name}"));
    let inner: usize = shape[axis + 1..].iter().product();
    let n = shape[axis];
    for (i, x) in values.iter_mut().enumerate() {
        if chosen(i / inner % n) {
            *x *= factor;
        }
    }
}

/// Plants in every operand that has 8-bit or 4-bit matrices; returns how many.
fn plant(tensors: &mut Tensors, network: &Network, plant: Plant) -> usize {
    let specs = network.weights();
    let mut planted = 0;
    for (o, operand) in network.operands().into_iter().enumerate() {
        let first = &specs[operand.matrices[0]];
        let WeightKind::Matrix { k, .. } = first.kind else { panic!("{} is a matrix", first.name) };
        if k < 2 * EVERY || matches!(first.role, Role::ConvIn | Role::ConvOut | Role::Embedding | Role::Shortcut) {
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
                Origin::Matrix { weight, bias, activation } if matches!(activation, Activation::None | Activation::Geglu) => {
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
        .map(|(name, (shape, x))| (name.clone(), shape.clone(), x.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let out = folder.join("unet/diffusion_pytorch_model.safetensors");
    std::fs::write(out, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn pipeline(file: ModelFile, precision: Precision) -> Pipeline {
    Pipeline::new(file, Settings { precision, ..Settings::default() }).unwrap()
}

/// The median error of a noise prediction along the exact trajectory, at q8 and q4 `fast`; and that trajectory.
fn errors(checkpoint: &Path) -> ([f64; 2], Trajectory) {
    let exact = pipeline(model(checkpoint, Quant::F16), Precision::Exact);
    let request = Request { seed: 3, ..Request::new("a red circle on a blue background", exact.card()) };
    let along = trajectory::run(&exact, &request, &|| Control::Continue).unwrap();
    let errors = [Quant::Q8, Quant::Q4].map(|quant| {
        let pipeline = pipeline(model(checkpoint, quant), Precision::Fast);
        median(&trajectory::errors(&pipeline, &request, &along, 1, &|| Control::Continue).unwrap())
    });
    (errors, along)
}

#[test]
fn wide_channels_hardly_cost_anything() {
    let plain_checkpoint = demo().join("model");
    let card = model(&plain_checkpoint, Quant::F16).card().clone();
    let network = networks(&card).into_iter().find(|(part, _)| *part == Part::Unet).unwrap().1;
    let (plain, _) = errors(&plain_checkpoint);
    report(&format!("plain: q8 {:.4}, q4 {:.4}", plain[0], plain[1]));
    let mut failed = vec![];
    for what in [Plant::Inputs, Plant::Activations, Plant::InputsAlone, Plant::OutputsAlone] {
        let mut tensors = unet();
        let operands = plant(&mut tensors, &network, what);
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &tensors);
        let (got, _) = errors(folder.path());
        report(&format!("{what:?} in {operands} operands: q8 {:.4}, q4 {:.4}", got[0], got[1]));
        for (got, plain) in got.into_iter().zip(plain) {
            if got > MORE * plain {
                failed.push((what, got / plain));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}
