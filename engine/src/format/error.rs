//! What can be wrong with a model file.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

/// A file that can't be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("can't {action} {}: {source}", path.display())]
    Io {
        /// `open`, `read`, `write`, ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is of another kind.
    #[error("{file} is not an .sdq file")]
    NotSdq {
        /// The file.
        file: String,
    },
    /// The file has a version of the format that this program doesn't know.
    #[error("{file} has version {found} of the format, this program reads version {}", super::VERSION)]
    Version {
        /// The file.
        file: String,
        /// Its version.
        found: u32,
    },
    /// Bytes are missing at the end, or there are too many.
    #[error("{file} should have {expected} bytes, but has {found}")]
    Length {
        /// The file.
        file: String,
        /// Bytes according to the header.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The file contradicts itself or its checksums.
    #[error("{file} is damaged: {fault}")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong.
        fault: String,
    },
    /// The card describes no model that this program can run.
    #[error("{file} describes a model that can't be: {fault}")]
    Card {
        /// The file.
        file: String,
        /// What is wrong.
        fault: String,
    },
    /// The file is no model, but something to be used beside one.
    #[error("{file} holds a VAE alone, no model")]
    VaeAlone {
        /// The file.
        file: String,
    },
    /// The file was cut short while it was in use.
    #[error("{} was cut short or became unreadable while it was in use", path.display())]
    Lost {
        /// The file.
        path: PathBuf,
    },
    /// The file has got other bytes while it was in use.
    #[error("{} was written to while it was in use", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The disk has no room for the whole file.
    #[error("no room for the {needed} bytes of {}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Its length.
        needed: u64,
    },
}

impl Error {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::NotSdq { .. } => Some("convert a checkpoint with `sdconv CHECKPOINT`"),
            Error::VaeAlone { .. } => Some("name a model with -m, and this file with --vae"),
            Error::Version { .. } => Some("convert the checkpoint again with this version's sdconv"),
            Error::Lost { .. } | Error::Length { .. } | Error::Damaged { .. } => {
                Some("copy or download the file again, or convert the checkpoint again")
            }
            Error::Changed { .. } => Some("run it again; a new file is best renamed over the old one"),
            Error::Card { .. } => Some("convert the checkpoint again with this version's sdconv"),
            Error::NoSpace { .. } => Some("free some space, or write to another disk with -o"),
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Some("check the path"),
                io::ErrorKind::PermissionDenied => Some("check the permissions of the file and its folder"),
                _ => None,
            },
        }
    }
}
