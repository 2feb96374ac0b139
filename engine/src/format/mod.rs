#![doc = include_str!("../../../FORMAT.md")]

mod checksum;
mod error;
mod file;
mod index;
mod lost;
mod reader;
mod writer;

pub use checksum::xxh64;
pub use error::Error;
pub use index::{Part, Tensor};
pub use reader::{Aligned, ModelFile, VaeFile, WeightFile};
pub use writer::{Layout, Tokenizer, Writer};

/// First bytes of every file.
pub const MAGIC: [u8; 8] = *b"\x89SDQ\r\n\x1a\n";
/// The version this program writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// Parts start at multiples of this many bytes.
pub const PART_ALIGN: u64 = 4096;
/// Sections and tensors start at multiples of this many bytes.
pub const TENSOR_ALIGN: u64 = kernels::layout::ALIGN as u64;
/// The system maps a file in pieces of so many bytes around the one that is read.
pub const FAULT_BYTES: usize = 64 << 10;
/// The most of a file's cached bytes that the system handles, and may map, as one.
pub const FOLIO_BYTES: usize = 2 << 20;

const _: () = assert!(usize::BITS >= 64, "model files are mapped whole");
