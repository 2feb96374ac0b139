//! Checkpoints made here: any model in any layout that people have, with given or with random weights. For tests, and for
//! learning what a model costs before downloading it.
#![forbid(unsafe_code)]

mod cards;
mod configs;
mod gguf;
mod model;
mod names;
mod random;
mod safetensors;
mod torch;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use engine::card::{Card, ClipConfig, Family};
use engine::graph::weight::{Role, WeightKind, WeightSpec};
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::Error;
use crate::report::shape_of;
use crate::tokenizer;
pub use cards::{MODELS, card};
pub use model::write_model;
pub use random::random;

/// A layout to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A folder per network.
    Diffusers,
    /// The same, with the UNet in two files and an index.
    Sharded,
    /// One `.safetensors` file with the names of the original code.
    Ldm,
    /// The same as a zip with a pickle (`.ckpt`, `.pt`).
    Zip,
    /// The same as the older kind of pickle.
    Pickle,
    /// The same as GGUF.
    Gguf,
}

impl Layout {
    /// Every layout and the name people type.
    pub const ALL: [(&str, Layout); 6] = [
        ("diffusers", Layout::Diffusers),
        ("sharded", Layout::Sharded),
        ("ldm", Layout::Ldm),
        ("zip", Layout::Zip),
        ("pickle", Layout::Pickle),
        ("gguf", Layout::Gguf),
    ];
}

/// Type of the numbers to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Number {
    /// 32 bits.
    F32,
    /// 16 bits.
    #[default]
    F16,
    /// 16 bits, with f32's range.
    Bf16,
    /// 8 bits, 3 of them mantissa; not in GGUF and the older pickles.
    F8E4M3,
    /// 8 bits, 2 of them mantissa; not in GGUF and the older pickles.
    F8E5M2,
}

impl Number {
    /// Every type and the name people type.
    pub const ALL: [(&str, Number); 5] = [
        ("f32", Number::F32),
        ("f16", Number::F16),
        ("bf16", Number::Bf16),
        ("f8_e4m3", Number::F8E4M3),
        ("f8_e5m2", Number::F8E5M2),
    ];

    fn bytes(self) -> usize {
        match self {
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
            Number::F8E4M3 | Number::F8E5M2 => 1,
        }
    }

    fn is_f8(self) -> bool {
        self.bytes() == 1
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Number::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Number::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Number::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Number::F8E4M3 => nearest(Dtype::F8E4M3, values),
            Number::F8E5M2 => nearest(Dtype::F8E5M2, values),
        }
    }
}

/// The byte of a one-byte type whose value is nearest to each of `values`.
fn nearest(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    // Without the sign, larger bytes are larger numbers, up to those that aren't finite.
    let positive: Vec<u8> = (0..0x80).collect();
    let mut levels = vec![0.0; positive.len()];
    dtype.to_f32(&positive, &mut levels);
    levels.truncate(levels.iter().position(|v| !v.is_finite()).expect("the last ones are none"));
    let byte = |value: f32| {
        let size = value.abs();
        let above = levels.partition_point(|&level| level < size).min(levels.len() - 1);
        let below = above.saturating_sub(1);
        let nearer = if levels[above] - size < size - levels[below] { above } else { below };
        nearer as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
    };
    values.iter().map(|&value| byte(value)).collect()
}

/// A tensor of a model, as diffusers has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Canonical name.
    pub name: String,
    /// As in a diffusers folder.
    pub shape: Vec<usize>,
    /// The part it plays.
    pub role: Role,
}

impl Tensor {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Values of a tensor, in the order of its dimensions.
pub type Values<'a> = dyn Fn(&Tensor) -> Vec<f32> + 'a;

/// A tensor of a file to be written: one of the model's, several one after another, or a marker.
struct Entry {
    name: String,
    shape: Vec<usize>,
    number: Number,
    from: Vec<Tensor>,
    /// Whether rows and columns are exchanged.
    transposed: bool,
    /// The numbers of a marker, which is no tensor of the model's.
    marker: Vec<f32>,
}

impl Entry {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in the file.
    fn len(&self) -> usize {
        self.count() * self.number.bytes()
    }

    fn bytes(&self, values: &Values<'_>) -> Vec<u8> {
        let mut all: Vec<f32> =
            self.from.iter().flat_map(values).chain(self.marker.iter().copied()).collect();
        assert_eq!(all.len(), self.count(), "{}", self.name);
        if self.transposed {
            let [rows, cols] = self.shape[..] else { panic!("{} is no matrix", self.name) };
            all = (0..all.len()).map(|i| all[i % cols * rows + i / cols]).collect();
        }
        self.number.encode(&all)
    }
}

/// Every tensor of a model as it is published: also those that no picture needs.
pub fn tensors(card: &Card) -> Vec<Tensor> {
    let mut specs: Vec<WeightSpec> = Vec::new();
    for (i, text) in card.text_encoders.iter().enumerate() {
        let whole = ClipConfig { output_layer: 1, output_norm: true, ..text.clone() };
        specs.extend_from_slice(engine::models::clip(i, &whole, 1, 1).weights());
    }
    let rest = engine::models::weights(card).into_iter().flat_map(|(_, specs)| specs);
    specs.extend(rest.filter(|s| !s.name.starts_with("text_encoder")));
    specs.into_iter().map(|spec| tensor(card, spec)).collect()
}

fn tensor(card: &Card, spec: WeightSpec) -> Tensor {
    let mut shape = shape_of(&spec.kind);
    let conv = ["conv_shortcut.weight", "quant_conv.weight"].iter().any(|e| spec.name.ends_with(e));
    let projection = spec.role == Role::Projection && !card.unet.use_linear_projection;
    if matches!(spec.kind, WeightKind::Matrix { .. }) && (conv || projection) && shape.len() == 2 {
        shape.extend([1, 1]);
    }
    Tensor { name: spec.name, shape, role: spec.role }
}

/// Writes the model to `path`, which is a folder for the layouts of diffusers.
pub fn write(
    card: &Card,
    values: &Values<'_>,
    path: &Path,
    layout: Layout,
    number: Number,
) -> Result<(), Error> {
    let tensors = tensors(card);
    match layout {
        Layout::Diffusers | Layout::Sharded => write_folder(card, &tensors, values, path, layout, number),
        Layout::Pickle | Layout::Gguf if number.is_f8() => Err(Error::Unsupported {
            path: path.to_owned(),
            what: "its layout has no numbers of 8 bits".into(),
        }),
        Layout::Ldm => safetensors::write(path, &names::ldm(card, &tensors, number), values),
        Layout::Zip => torch::write_zip(path, &names::ldm(card, &tensors, number), values),
        Layout::Pickle => torch::write_legacy(path, &names::ldm(card, &tensors, number), values),
        Layout::Gguf => gguf::write(path, &names::ldm(card, &tensors, number), values),
    }
}

fn write_folder(
    card: &Card,
    tensors: &[Tensor],
    values: &Values<'_>,
    path: &Path,
    layout: Layout,
    number: Number,
) -> Result<(), Error> {
    // The refiner's folder calls its only text encoder the second.
    let folder = |part: &str| match (card.family, part) {
        (Family::SdxlRefiner, "text_encoder") => "text_encoder_2".to_owned(),
        _ => part.to_owned(),
    };
    for (file, json) in configs::all(card) {
        let (part, file) = file.split_once('/').map_or(("", file), |(part, file)| (part, file));
        let to = path.join(folder(part));
        fs::create_dir_all(&to).map_err(Error::io("create", &to))?;
        let json = serde_json::to_vec_pretty(&json).expect("a config is plain data");
        fs::write(to.join(file), json).map_err(Error::io("write", &to))?;
    }
    let files = tokenizer::choose(None);
    for sub in if card.text_encoders.len() == 2 { &["tokenizer", "tokenizer_2"][..] } else { &["tokenizer"] }
    {
        fs::write(path.join(sub).join("vocab.json"), &files.vocab).map_err(Error::io("write", path))?;
        fs::write(path.join(sub).join("merges.txt"), &files.merges).map_err(Error::io("write", path))?;
    }
    for part in ["text_encoder", "text_encoder_2", "unet", "vae"] {
        let entries: Vec<Entry> = tensors
            .iter()
            .filter_map(|t| Some((t.name.strip_prefix(part)?.strip_prefix('.')?, t)))
            .map(|(key, t)| Entry {
                name: key.to_owned(),
                shape: t.shape.clone(),
                number,
                from: vec![t.clone()],
                transposed: false,
                marker: Vec::new(),
            })
            .collect();
        if entries.is_empty() {
            continue;
        }
        let stem = if part.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
        let to = path.join(folder(part));
        if layout == Layout::Sharded && part == "unet" {
            write_shards(&to, stem, entries, values)?;
        } else {
            safetensors::write(&to.join(format!("{stem}.safetensors")), &entries, values)?;
        }
    }
    Ok(())
}

fn write_shards(
    folder: &Path,
    stem: &str,
    mut entries: Vec<Entry>,
    values: &Values<'_>,
) -> Result<(), Error> {
    let second = entries.split_off(entries.len() / 2);
    let mut map = serde_json::Map::new();
    for (i, entries) in [entries, second].iter().enumerate() {
        let file = format!("{stem}-{:05}-of-00002.safetensors", i + 1);
        safetensors::write(&folder.join(&file), entries, values)?;
        map.extend(entries.iter().map(|e| (e.name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    let path = folder.join(format!("{stem}.safetensors.index.json"));
    fs::write(&path, index.to_string()).map_err(Error::io("write", &path))
}

/// A file to be written from front to back.
struct Out<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    /// Bytes written.
    at: u64,
}

impl<'a> Out<'a> {
    fn create(path: &'a Path) -> Result<Self, Error> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Out { path, file: BufWriter::with_capacity(1 << 20, file), at: 0 })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.at += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io("write", self.path))
    }

    fn pad(&mut self, align: u64) -> Result<(), Error> {
        let zeros = self.at.next_multiple_of(align) - self.at;
        self.put(&vec![0; zeros as usize])
    }

    fn finish(mut self) -> Result<(), Error> {
        self.file.flush().map_err(|e: io::Error| Error::io("write", self.path)(e))
    }
}
