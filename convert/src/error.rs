//! Why a checkpoint can't be converted.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

/// A conversion that can't be. The message is one sentence; [`Error::hint`] says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused.
    #[error("can't {action} {}: {source}", path.display())]
    Io {
        /// `open`, `read`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is of no kind that holds weights.
    #[error("{} is no checkpoint: {why}", path.display())]
    NotACheckpoint {
        /// The file or folder.
        path: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// The file contradicts itself.
    #[error("{} is broken: {fault}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// The file holds weights, but no model to make pictures with.
    #[error("{} is {what}, not a whole model", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// For example `a LoRA`.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The model is of a kind that isn't known.
    #[error("{} can't be converted: {what}", path.display())]
    Unsupported {
        /// The file or folder.
        path: PathBuf,
        /// What about it isn't known.
        what: String,
    },
    /// Tensors that the model needs are not there.
    #[error("{} lacks {}", path.display(), some_of(names))]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// Canonical names.
        names: Vec<String>,
    },
    /// Tensors of the networks that the model has no place for.
    #[error("{} has {}, which a {family} model has no place for", path.display(), some_of(names))]
    Unexpected {
        /// The file or folder.
        path: PathBuf,
        /// What it was taken for.
        family: String,
        /// Names.
        names: Vec<String>,
    },
    /// A tensor of another shape than the model's.
    #[error("tensor {tensor} is {found:?} where {expected:?} is wanted")]
    Shape {
        /// Its name in the checkpoint.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits.
        expected: Vec<usize>,
    },
    /// A tensor of numbers that aren't weights.
    #[error("tensor {tensor} holds {dtype} numbers")]
    Dtype {
        /// Its name in the checkpoint.
        tensor: String,
        /// Their type.
        dtype: String,
    },
    /// A weight is infinite or not a number.
    #[error("tensor {tensor} has {count} values that are not finite")]
    NotFinite {
        /// Its name in the checkpoint.
        tensor: String,
        /// How many.
        count: u64,
    },
    /// A weight doesn't fit the encoding chosen for it.
    #[error("tensor {tensor} has values up to {largest}, too large for {encoding}")]
    Overflow {
        /// Its canonical name.
        tensor: String,
        /// Largest magnitude.
        largest: f32,
        /// The encoding.
        encoding: &'static str,
    },
    /// A `--keep` rule that can't be followed.
    #[error("the rule {rule:?} can't be followed: {fault}")]
    Rule {
        /// The rule.
        rule: String,
        /// Why.
        fault: String,
    },
    /// The output is there already.
    #[error("{} exists", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output can't be written.
    #[error(transparent)]
    Format(#[from] engine::format::Error),
    /// Nothing to calibrate with.
    #[error("there are no prompts in {}", .0.display())]
    NoPrompts(PathBuf),
    /// Calibration can't make its pictures.
    #[error("calibration failed: {0}")]
    Calibration(#[from] engine::error::Error),
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
}

impl Error {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "check the path",
                io::ErrorKind::PermissionDenied => "check the permissions of the file and its folder",
                _ => return None,
            },
            Error::NotACheckpoint { .. } => {
                "give a .safetensors, .ckpt, .pt or .gguf file, or a folder in the layout of diffusers"
            }
            Error::Broken { .. } => "copy or download the file again",
            Error::Kind { hint, .. } => return Some(hint.clone()),
            Error::Unsupported { .. } => "Stable Diffusion 1.x, 2.x, XL and its refiner can be converted",
            Error::Missing { .. } => "is the download complete, and is it a whole model?",
            Error::Unexpected { .. } => "--force converts it without them",
            Error::Shape { .. } => "if the model's configuration is unusual, give its folder with --config",
            Error::Dtype { .. } => "weights are f64, f32, f16, bf16, f8 or GGUF blocks",
            Error::NotFinite { .. } => {
                "the checkpoint is damaged; --force converts it with zeros in their place"
            }
            Error::Overflow { tensor, .. } => {
                return Some(format!("keep it as it is with --keep '{tensor}=f32'"));
            }
            Error::Rule { .. } => "a rule is GLOB=ENCODING, for example --keep 'vae.*=f16'",
            Error::Exists { .. } => "--force replaces it",
            Error::Format(e) => return e.hint().map(String::from),
            Error::NoPrompts(_) => "write one on each line",
            Error::Calibration(e) => return e.hint(),
            Error::Stopped => return None,
        };
        Some(text.to_owned())
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn broken(path: &Path, fault: impl Into<String>) -> Error {
        Error::Broken { path: path.to_owned(), fault: fault.into() }
    }
}

/// The first names, and how many more there are.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more tensors", names.len() - SHOWN);
    }
    text
}
