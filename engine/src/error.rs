//! What can keep the engine from making a picture.
#![forbid(unsafe_code)]

/// Why there is no picture. The message is one sentence; [`Error::hint`] says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A side of the picture is too short or too long.
    #[error("a picture of {width}x{height} can't be made: {side} pixels are outside {min} to {max}")]
    SizeOutOfRange {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
        /// The offending side, in pixels.
        side: usize,
        /// Shortest side.
        min: usize,
        /// Longest side.
        max: usize,
    },
    /// A side of the picture is no whole number of latents.
    #[error("a picture of {width}x{height} can't be made: {side} is not a multiple of {multiple}")]
    SizeNotMultiple {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
        /// The offending side, in pixels.
        side: usize,
        /// Pixels per latent.
        multiple: usize,
    },
    /// No steps, or more than the model was trained on.
    #[error("{steps} sampling steps can't be made: the model has 1 to {max}")]
    Steps {
        /// Steps asked for.
        steps: usize,
        /// Timesteps of training.
        max: usize,
    },
    /// Guidance that is no number or would only make noise.
    #[error("a guidance scale of {0} can't be used")]
    GuidanceScale(f32),
    /// A name that isn't in the sampler table.
    #[error("there is no sampler named {name:?}")]
    UnknownSampler {
        /// The name asked for.
        name: String,
        /// Names in the table.
        known: Vec<&'static str>,
    },
    /// A name that isn't in the table of noise schedules.
    #[error("there is no noise schedule named {name:?}")]
    UnknownSchedule {
        /// The name asked for.
        name: String,
        /// Names in the table.
        known: Vec<&'static str>,
    },
    /// A noise schedule for a sampler that has its own.
    #[error("the sampler {sampler} has its own noise schedule")]
    OwnSchedule {
        /// Name in the sampler table.
        sampler: &'static str,
    },
    /// A sampler over timesteps for a model that has none.
    #[error("the sampler {sampler} needs timesteps, and this model has continuous noise levels (EDM)")]
    NoTimesteps {
        /// Name in the sampler table.
        sampler: &'static str,
    },
    /// A network that reads a picture or a mask beside the latents.
    #[error("this model edits pictures: its network reads {found} channels, and latents have {latents}")]
    EditsPictures {
        /// Channels that the network reads.
        found: usize,
        /// Channels of the latents.
        latents: usize,
    },
    /// A VAE that was given beside the model, and isn't for its latents.
    #[error("this VAE doesn't fit the model: {what}")]
    VaeMisfit {
        /// What contradicts.
        what: String,
    },
    /// Pixels can't become latents.
    #[error("the VAE has a decoder alone")]
    NoEncoder,
    /// Latents of another size than the picture's.
    #[error("the latents are {found:?} where {expected:?} is wanted ([channels, height, width])")]
    LatentsShape {
        /// `[channels, height, width]`
        found: [usize; 3],
        /// `[channels, height, width]`
        expected: [usize; 3],
    },
    /// Latents with an infinity or a NaN.
    #[error("the latents hold a value that is not finite")]
    LatentsNotFinite,
    /// The vocabulary or the merges of the tokenizer don't parse.
    #[error("the tokenizer of the model can't be used: {0}")]
    Tokenizer(String),
    /// The model file lacks a tensor that its networks want.
    #[error("the model has no tensor {name}")]
    TensorMissing {
        /// Canonical name.
        name: String,
    },
    /// A tensor of the model file is not of the shape that its networks want.
    #[error("the model's tensor {name} is not of the shape that its card describes")]
    TensorShape {
        /// Canonical name.
        name: String,
    },
    /// The budget is too small.
    #[error("{} of memory are too few: this picture needs {}", mebibytes(*budget), mebibytes(*needed))]
    Ram {
        /// Bytes allowed.
        budget: u64,
        /// Bytes that are enough.
        needed: u64,
    },
    /// The model file can't be read any more.
    #[error(transparent)]
    File(#[from] crate::format::Error),
    /// The system has no memory for the activations.
    #[error("no memory for {bytes} bytes of activations")]
    NoMemory {
        /// Size of the arena.
        bytes: usize,
    },
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
}

impl Error {
    /// What the reader can do about it, in one sentence.
    pub fn hint(&self) -> Option<String> {
        let nearest = |side: usize, multiple: usize| {
            let below = side / multiple * multiple;
            format!("{} and {} are multiples of {multiple}", below, below + multiple)
        };
        match self {
            Error::SizeOutOfRange { min, max, .. } => {
                Some(format!("choose -W and -H between {min} and {max}; the model's own size needs neither"))
            }
            Error::SizeNotMultiple { side, multiple, .. } => Some(nearest(*side, *multiple)),
            Error::Steps { .. } => Some("20 to 30 steps are usual".into()),
            Error::GuidanceScale(_) => Some("1 is no guidance, 4 to 8 are usual, 100 is the most".into()),
            Error::UnknownSampler { known, .. } => Some(format!("known samplers: {}", known.join(", "))),
            Error::UnknownSchedule { known, .. } => Some(format!("known schedules: {}", known.join(", "))),
            Error::OwnSchedule { .. } => Some("leave --schedule out, or choose another --sampler".into()),
            Error::NoTimesteps { .. } => {
                Some("choose another --sampler, for example dpmpp_2m or euler".into())
            }
            Error::EditsPictures { .. } => Some(
                "inpainting and editing are not there yet; use a model that makes pictures from text".into(),
            ),
            Error::VaeMisfit { .. } => {
                Some("SD 1.x and 2.x take the VAEs made for them, SDXL others; without --vae it is the model's own".into())
            }
            Error::NoEncoder => Some("convert a VAE with its encoder".into()),
            Error::LatentsShape { expected: [_, h, w], .. } => {
                Some(format!("the latents must belong to the picture's size, here {w} wide and {h} high"))
            }
            Error::Tokenizer(_) | Error::TensorMissing { .. } | Error::TensorShape { .. } => {
                Some("convert the checkpoint again".into())
            }
            Error::Ram { needed, .. } => {
                Some(format!("use --ram {}M or more, or make a smaller picture", needed.div_ceil(1 << 20)))
            }
            Error::File(e) => e.hint().map(str::to_owned),
            Error::NoMemory { .. } => Some("make a smaller picture, or close other programs".into()),
            Error::LatentsNotFinite | Error::Stopped => None,
        }
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
