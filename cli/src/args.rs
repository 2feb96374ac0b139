//! What people type: every command and flag of both programs.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use convert::Quant;
use convert::synthetic::{Layout, Number};
use engine::card::{Family, Prediction};
use engine::pipeline::Noise;
use engine::precision::Precision;
use kernels::Isa;

use crate::size::Ram;

/// Stable Diffusion pictures on ordinary CPUs.
#[derive(Debug, Parser)]
#[command(name = "sdfast", version, disable_help_subcommand = true)]
pub struct Sdfast {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands of `sdfast`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a picture.
    Gen(Box<Gen>),
    /// Show what a run will hold in memory, before it begins.
    Plan(Box<Plan>),
    /// Show what quantization costs: errors along fixed trajectories, and pictures side by side.
    Compare(Box<Compare>),
    /// Show the settings inside a picture, or what a model is.
    Info(Info),
    /// Measure the speed of this machine.
    #[command(subcommand)]
    Bench(Bench),
    /// List the kernels, the instruction sets of this machine, and which is used.
    Kernels,
}

/// `sdfast gen`
#[derive(Debug, Args)]
pub struct Gen {
    /// What is to be seen.
    #[arg(default_value = "")]
    pub prompt: String,
    /// Model; without it, the small one that is part of the program.
    #[arg(short, long, value_name = "MODEL.sdq")]
    pub model: Option<PathBuf>,
    /// Take the VAE from this file, a model or a VAE alone: TAESD decodes in a fraction of the time.
    #[arg(long, value_name = "FILE.sdq")]
    pub vae: Option<PathBuf>,
    /// Picture to write [default: sdfast-SEED.png].
    #[arg(short, long, value_name = "OUT.png")]
    pub output: Option<PathBuf>,
    /// What is not to be seen.
    #[arg(short, long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub negative: String,
    /// Sampler steps [default: the model's].
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance: how much the prompt counts; 1 is none and twice as fast [default: the model's].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub cfg: Option<f32>,
    /// Seed of the noise [default: a new one each time].
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Width in pixels [default: the model's].
    #[arg(short = 'W', long, value_name = "PX")]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's].
    #[arg(short = 'H', long, value_name = "PX")]
    pub height: Option<usize>,
    /// Sampler [default: the model's].
    #[arg(long, value_name = "NAME")]
    pub sampler: Option<String>,
    /// How noise levels are spread [default: the model's way].
    #[arg(long, value_name = "NAME")]
    pub schedule: Option<String>,
    /// Pictures to make; each takes the next seed.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
    /// Where the noise comes from: torch on a CPU (diffusers, ComfyUI), or Philox (the WebUI).
    #[arg(long, value_name = "KIND", default_value = "torch")]
    pub rng: RngArg,
    /// Start from these latents (safetensors) in place of noise.
    #[arg(long, value_name = "FILE")]
    pub latents_in: Option<PathBuf>,
    /// Write the final latents (safetensors).
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,
    /// How the machine is used.
    #[command(flatten)]
    pub machine: Machine,
    /// Where the time went.
    #[command(flatten)]
    pub profiling: Profiling,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// How much is said.
    #[command(flatten)]
    pub voice: Voice,
}

/// `sdfast plan`
#[derive(Debug, Args)]
pub struct Plan {
    /// Model; without it, the small one that is part of the program.
    #[arg(short, long, value_name = "MODEL.sdq", conflicts_with_all = ["family", "quant"])]
    pub model: Option<PathBuf>,
    /// A published model, planned without its file: sd15, sd2, sdxl, ...
    #[arg(long, value_name = "NAME")]
    pub family: Option<String>,
    /// Take the VAE from this file, a model or a VAE alone: TAESD decodes in a fraction of the time.
    #[arg(long, value_name = "FILE.sdq")]
    pub vae: Option<PathBuf>,
    /// How the model of --family is packed.
    #[arg(long, value_name = "BITS", default_value = "q8")]
    pub quant: QuantArg,
    /// Width in pixels [default: the model's].
    #[arg(short = 'W', long, value_name = "PX")]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's].
    #[arg(short = 'H', long, value_name = "PX")]
    pub height: Option<usize>,
    /// Guidance; 1 is none [default: the model's].
    #[arg(long, value_name = "X")]
    pub cfg: Option<f32>,
    /// Draw the arena of the neediest network over time.
    #[arg(long, value_name = "FILE.svg")]
    pub svg: Option<PathBuf>,
    /// How the machine is used.
    #[command(flatten)]
    pub machine: Machine,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// How much is said.
    #[command(flatten)]
    pub voice: Voice,
}

/// `sdfast compare`
#[derive(Debug, Args)]
pub struct Compare {
    /// Models; the first one, at exact, is what all are compared with.
    #[arg(required = true, value_name = "MODEL.sdq")]
    pub models: Vec<PathBuf>,
    /// Folder for the table and the contact sheet.
    #[arg(short, long, value_name = "FOLDER")]
    pub output: PathBuf,
    /// What is to be seen; may be repeated.
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// File with a prompt on each line.
    #[arg(long, value_name = "FILE.txt")]
    pub prompts: Option<PathBuf>,
    /// First seed.
    #[arg(long, value_name = "S", default_value = "0")]
    pub seed: u64,
    /// Seeds for each prompt.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
    /// Sampler steps [default: the model's].
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance; 1 is none [default: the model's].
    #[arg(long, value_name = "X")]
    pub cfg: Option<f32>,
    /// Sampler [default: the model's].
    #[arg(long, value_name = "NAME")]
    pub sampler: Option<String>,
    /// Width in pixels [default: the model's].
    #[arg(short = 'W', long, value_name = "PX")]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's].
    #[arg(short = 'H', long, value_name = "PX")]
    pub height: Option<usize>,
    /// Precisions that are compared: some of fast, high, exact.
    #[arg(long, value_name = "LEVELS", value_delimiter = ',', default_value = "fast,high")]
    pub precision: Vec<PrecisionArg>,
    /// List the weights that changed most.
    #[arg(long)]
    pub weights: bool,
    /// List the layers whose outputs are off most, given exact inputs.
    #[arg(long)]
    pub layers: bool,
    /// Draw every Nth of the hundred prompts that the demo model is scored by, and tell how many pictures show what they say.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub score: Option<u16>,
    /// Threads [default: all processors].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Use no better instruction sets than these [default: the machine's best].
    #[arg(long, value_name = "TIER", value_parser = isa)]
    pub isa: Option<Isa>,
    /// How much is said.
    #[command(flatten)]
    pub voice: Voice,
}

/// How the machine is used.
#[derive(Debug, Args)]
pub struct Machine {
    /// Memory the program may hold: 300M, 2G, or a share of the machine's like 50% [default: what is free].
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Ram>,
    /// Threads [default: all processors].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Use no better instruction sets than these [default: the machine's best].
    #[arg(long, value_name = "TIER", value_parser = isa)]
    pub isa: Option<Isa>,
    /// fast, high or exact.
    #[arg(long, value_name = "LEVEL", default_value = "fast")]
    pub precision: PrecisionArg,
}

/// Where the time went.
#[derive(Debug, Args)]
pub struct Profiling {
    /// Print where the time went, or write it to a file that browsers' tracing viewers open.
    #[arg(long, value_name = "FILE.json", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    pub profile: Option<PathBuf>,
}

/// How much is said.
#[derive(Clone, Copy, Debug, Args)]
pub struct Voice {
    /// Say nothing but results and errors.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more.
    #[arg(short, long)]
    pub verbose: bool,
}

/// `sdfast info`
#[derive(Debug, Args)]
pub struct Info {
    /// A picture (.png) or a model (.sdq).
    pub file: PathBuf,
}

/// `sdfast bench`
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Run every kernel at a shape, beside what the machine can do at most.
    Gemm(BenchGemm),
    /// Make a picture with a model, or with made-up weights of a family's size.
    Model(Box<BenchModel>),
}

/// `sdfast bench gemm`
#[derive(Debug, Args)]
pub struct BenchGemm {
    /// Rows, outputs and inputs.
    #[arg(value_names = ["M", "N", "K"], num_args = 3, default_values = ["1024", "1280", "1280"])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub shape: Vec<u32>,
    /// Use no better instruction sets than these [default: the machine's best].
    #[arg(long, value_name = "TIER", value_parser = isa)]
    pub isa: Option<Isa>,
    /// Threads.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `sdfast bench model`
#[derive(Debug, Args)]
pub struct BenchModel {
    /// Model; without it and without --family, the small one that is part of the program.
    #[arg(short, long, value_name = "MODEL.sdq", conflicts_with = "family")]
    pub model: Option<PathBuf>,
    /// Make up a model of this kind: sd15, sd2, sdxl, ...
    #[arg(long, value_name = "NAME")]
    pub family: Option<String>,
    /// Take the VAE from this file, a model or a VAE alone: TAESD decodes in a fraction of the time.
    #[arg(long, value_name = "FILE.sdq")]
    pub vae: Option<PathBuf>,
    /// How far the made-up weights are quantized.
    #[arg(long, value_name = "BITS", default_value = "q8", requires = "family")]
    pub quant: QuantArg,
    /// Remove the made-up model afterwards.
    #[arg(long, requires = "family")]
    pub no_keep: bool,
    /// Width in pixels [default: the model's].
    #[arg(short = 'W', long, value_name = "PX")]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's].
    #[arg(short = 'H', long, value_name = "PX")]
    pub height: Option<usize>,
    /// Sampler steps.
    #[arg(long, value_name = "N", default_value = "3")]
    pub steps: usize,
    /// Guidance; 1 measures one network pass a step [default: the model's].
    #[arg(long, value_name = "X")]
    pub cfg: Option<f32>,
    /// How the machine is used.
    #[command(flatten)]
    pub machine: Machine,
    /// Where the time went.
    #[command(flatten)]
    pub profiling: Profiling,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// How much is said.
    #[command(flatten)]
    pub voice: Voice,
}

/// Pack a Stable Diffusion checkpoint into one .sdq file.
#[derive(Debug, Parser)]
#[command(name = "sdconv", version, args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub struct Sdconv {
    /// Something else than converting.
    #[command(subcommand)]
    pub command: Option<ConvertCommand>,
    /// Converting.
    #[command(flatten)]
    pub convert: Convert,
}

/// Commands of `sdconv`.
#[derive(Debug, Subcommand)]
pub enum ConvertCommand {
    /// Show what is in a checkpoint or an .sdq file.
    Inspect(Inspect),
    /// Write a checkpoint of a published model's sizes with random weights, to try things with.
    Synthetic(Synthetic),
}

/// `sdconv CHECKPOINT`
#[derive(Debug, Args)]
pub struct Convert {
    /// A .safetensors, .ckpt, .pt or .gguf file, or a folder in the layout of diffusers: a model, or a TAESD alone.
    pub checkpoint: Option<PathBuf>,
    /// File to write [default: the checkpoint's name and .q8.sdq, in this folder].
    #[arg(short, long, value_name = "FILE.sdq")]
    pub output: Option<PathBuf>,
    /// How far weights are quantized.
    #[arg(long, value_name = "BITS", default_value = "q8")]
    pub quant: QuantArg,
    /// Keep weights whose names fit at an encoding, as 'vae.*=f16'; may be repeated, the last that fits counts.
    #[arg(long, value_name = "GLOB=ENCODING")]
    pub keep: Vec<String>,
    /// Take the VAE from this file or folder.
    #[arg(long, value_name = "FILE")]
    pub vae: Option<PathBuf>,
    /// What the checkpoint must be [default: recognized].
    #[arg(long, value_name = "NAME")]
    pub family: Option<FamilyArg>,
    /// What the network predicts, where the checkpoint doesn't say it.
    #[arg(long, value_name = "KIND")]
    pub prediction: Option<PredictionArg>,
    /// Folder in the layout of diffusers with the configuration of an unusual model.
    #[arg(long, value_name = "FOLDER")]
    pub config: Option<PathBuf>,
    /// Make pictures of the prompts in this file (one on each line) to learn what the layers see, and round accordingly:
    /// half the error for minutes more.
    #[arg(long, value_name = "FILE.txt")]
    pub calibrate: Option<PathBuf>,
    /// Write what became of each tensor.
    #[arg(long, value_name = "FILE.json")]
    pub report: Option<PathBuf>,
    /// Threads [default: all processors].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Replace an existing file; convert in spite of tensors that don't belong.
    #[arg(long)]
    pub force: bool,
    /// How much is said.
    #[command(flatten)]
    pub voice: Voice,
}

/// `sdconv inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// A checkpoint, a folder, or an .sdq file.
    pub file: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `sdconv synthetic`
#[derive(Debug, Args)]
pub struct Synthetic {
    /// Whose sizes: sd15, sd2, sdxl, ...; with tiny- before it, a miniature.
    pub name: String,
    /// File to write, or folder for the layouts of diffusers; must not be there.
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
    /// diffusers, sharded (the same with the denoiser in two files), ldm (.safetensors), zip (.ckpt), pickle (the older
    /// .ckpt), gguf.
    #[arg(long, value_name = "NAME", default_value = "ldm", value_parser = layout)]
    pub layout: Layout,
    /// Type of the numbers: f32, f16, bf16, f8_e4m3, f8_e5m2.
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = number)]
    pub dtype: Number,
    /// The same seed gives the same weights in every layout.
    #[arg(long, value_name = "N", default_value = "1")]
    pub seed: u64,
}

/// Values of `--precision`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrecisionArg {
    /// 8-bit activations.
    Fast,
    /// bf16 activations.
    High,
    /// f32 activations.
    Exact,
}

impl From<PrecisionArg> for Precision {
    fn from(value: PrecisionArg) -> Self {
        match value {
            PrecisionArg::Fast => Precision::Fast,
            PrecisionArg::High => Precision::High,
            PrecisionArg::Exact => Precision::Exact,
        }
    }
}

/// Values of `--rng`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RngArg {
    /// torch on a CPU.
    Torch,
    /// CUDA's Philox.
    Philox,
}

impl From<RngArg> for Noise {
    fn from(value: RngArg) -> Self {
        match value {
            RngArg::Torch => Noise::Torch,
            RngArg::Philox => Noise::Philox,
        }
    }
}

/// Values of `--quant`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum QuantArg {
    /// 8 bits: no visible difference.
    Q8,
    /// A mix of 4 and 8 bits.
    Q4,
    /// 16 bits.
    F16,
}

impl From<QuantArg> for Quant {
    fn from(value: QuantArg) -> Self {
        match value {
            QuantArg::Q8 => Quant::Q8,
            QuantArg::Q4 => Quant::Q4,
            QuantArg::F16 => Quant::F16,
        }
    }
}

/// Values of `--family`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FamilyArg {
    /// Stable Diffusion 1.x.
    Sd15,
    /// Stable Diffusion 2.x.
    Sd2,
    /// Stable Diffusion XL.
    Sdxl,
    /// The SDXL refiner.
    SdxlRefiner,
}

impl From<FamilyArg> for Family {
    fn from(value: FamilyArg) -> Self {
        match value {
            FamilyArg::Sd15 => Family::Sd15,
            FamilyArg::Sd2 => Family::Sd2,
            FamilyArg::Sdxl => Family::Sdxl,
            FamilyArg::SdxlRefiner => Family::SdxlRefiner,
        }
    }
}

/// Values of `--prediction`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PredictionArg {
    /// The noise.
    Epsilon,
    /// The velocity.
    V,
}

impl From<PredictionArg> for Prediction {
    fn from(value: PredictionArg) -> Self {
        match value {
            PredictionArg::Epsilon => Prediction::Epsilon,
            PredictionArg::V => Prediction::V,
        }
    }
}

fn isa(name: &str) -> Result<Isa, String> {
    let known = || Isa::ALL.map(Isa::name).join(", ");
    Isa::parse(name).ok_or_else(|| format!("the tiers are {}", known()))
}

fn layout(name: &str) -> Result<Layout, String> {
    named(&Layout::ALL, name)
}

fn number(name: &str) -> Result<Number, String> {
    named(&Number::ALL, name)
}

/// The value that people call `name`.
fn named<T: Copy>(all: &[(&str, T)], name: &str) -> Result<T, String> {
    let known = || all.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let found = all.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| *value).ok_or_else(|| format!("it is one of {}", known()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn definitions_are_consistent() {
        super::Sdfast::command().debug_assert();
        super::Sdconv::command().debug_assert();
    }
}
