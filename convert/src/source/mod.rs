//! Checkpoints as people have them: names, shapes, and values as f32 on demand. Nothing is mapped or kept; memory is what
//! the caller asks for.
#![forbid(unsafe_code)]

mod folder;
mod gguf;
pub(crate) mod gguf_blocks;
mod pickle;
mod safetensors;
mod taesd;
mod torch;
mod zip;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::dtype::Dtype;
use crate::error::Error;
pub(crate) use folder::{Configs, TokenizerFiles, read_configs};

/// Longest header or pickle that is read into memory.
const MAX_HEADER: u64 = 256 << 20;

/// A checkpoint: one file or a folder.
#[derive(Debug)]
pub(crate) struct Source {
    /// What the user named.
    pub(crate) path: PathBuf,
    /// What it is, for people: `safetensors file`, ...
    pub(crate) layout: &'static str,
    files: Vec<OpenFile>,
    /// Tensors by their name; a folder's begin with the folder of their network and a dot.
    pub(crate) tensors: BTreeMap<String, RawTensor>,
    /// The `config.json` files of a folder.
    pub(crate) configs: Configs,
    /// The tokenizer of a folder.
    pub(crate) tokenizer: Option<TokenizerFiles>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    file: File,
    len: u64,
}

/// A tensor where it lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RawTensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
    file: usize,
    /// Of the first number, from the start of the file.
    offset: u64,
    /// For each dimension, the numbers between neighbors; `None` where rows lie one after another.
    strides: Option<Vec<usize>>,
}

impl RawTensor {
    /// How many numbers it has.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes they take in the checkpoint.
    pub(crate) fn bytes(&self) -> u64 {
        self.dtype.bytes(self.count()).unwrap_or(0)
    }
}

impl Source {
    /// Opens whatever it is and reads what it says about its tensors.
    pub(crate) fn open(path: &Path) -> Result<Source, Error> {
        let meta = std::fs::metadata(path).map_err(Error::io("open", path))?;
        let mut source = Source {
            path: path.to_owned(),
            layout: "diffusers folder",
            files: Vec::new(),
            tensors: BTreeMap::new(),
            configs: Configs::default(),
            tokenizer: None,
        };
        if meta.is_dir() {
            folder::read(&mut source)?;
        } else {
            source.layout = source.add_file(path, "")?;
            taesd::join_halves(&mut source)?;
        }
        Ok(source)
    }

    /// Adds a file's tensors, with `prefix` before their names. Returns what it is.
    fn add_file(&mut self, path: &Path, prefix: &str) -> Result<&'static str, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len = file.metadata().map_err(Error::io("open", path))?.len();
        let open = OpenFile { path: path.to_owned(), file, len };
        let mut magic = Vec::new();
        (&open.file).take(16).read_to_end(&mut magic).map_err(Error::io("read", path))?;
        let (what, tensors) = match magic.as_slice() {
            [b'P', b'K', 3, 4, ..] => ("pickle in a zip", torch::read_zip(&open)?),
            [b'G', b'G', b'U', b'F', ..] => ("GGUF file", gguf::read(&open)?),
            [0x80, 2..=5, 0x8A, 0x0A, 0x6C, 0xFC, ..] => ("pickle", torch::read_legacy(&open)?),
            [_, _, _, _, _, 0, 0, 0, b'{', ..] => ("safetensors file", safetensors::read(&open)?),
            _ => return Err(Error::NotACheckpoint { path: path.to_owned(), why: describe(&magic, path) }),
        };
        let index = self.files.len();
        for (name, mut tensor) in tensors {
            check_place(&tensor, len).map_err(|e| Error::broken(path, format!("tensor {name} {e}")))?;
            tensor.file = index;
            if self.tensors.insert(format!("{prefix}{name}"), tensor).is_some() {
                return Err(Error::broken(path, format!("tensor {name} is there twice")));
            }
        }
        self.files.push(open);
        Ok(what)
    }

    /// Reads `out.len()` values from number `start` on, in the order of the dimensions. Both are whole blocks where the
    /// type has blocks.
    ///
    /// # Panics
    /// Where the tensor isn't stored in that order: see [`Source::read_all`].
    pub(crate) fn read(
        &self,
        tensor: &RawTensor,
        start: usize,
        out: &mut [f32],
        scratch: &mut Vec<u8>,
    ) -> Result<(), Error> {
        assert!(tensor.strides.is_none() && start + out.len() <= tensor.count(), "{start} of {tensor:?}");
        let file = &self.files[tensor.file];
        let at = tensor.offset + tensor.dtype.bytes(start).expect("whole blocks");
        scratch.resize(tensor.dtype.bytes(out.len()).expect("whole blocks") as usize, 0);
        read_exact_at(&file.file, scratch, at).map_err(Error::io("read", &file.path))?;
        tensor.dtype.to_f32(scratch, out);
        Ok(())
    }

    /// All values, in the order of the dimensions.
    pub(crate) fn read_all(&self, tensor: &RawTensor) -> Result<Vec<f32>, Error> {
        let mut values = vec![0.0; tensor.count()];
        let mut scratch = Vec::new();
        let Some(strides) = &tensor.strides else {
            self.read(tensor, 0, &mut values, &mut scratch)?;
            return Ok(values);
        };
        let span = 1 + tensor.shape.iter().zip(strides).map(|(n, s)| (n - 1) * s).sum::<usize>();
        let stored = RawTensor { shape: vec![span], strides: None, ..tensor.clone() };
        let mut numbers = vec![0.0; span];
        self.read(&stored, 0, &mut numbers, &mut scratch)?;
        let mut index = vec![0; tensor.shape.len()];
        for value in &mut values {
            *value = numbers[index.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>()];
            for (i, n) in index.iter_mut().zip(&tensor.shape).rev() {
                *i += 1;
                if *i < *n {
                    break;
                }
                *i = 0;
            }
        }
        Ok(values)
    }

    /// Whether rows can be read one by one.
    pub(crate) fn is_contiguous(tensor: &RawTensor) -> bool {
        tensor.strides.is_none()
    }
}

/// Checks that a tensor lies inside its file and that its size can be computed.
fn check_place(tensor: &RawTensor, file_bytes: u64) -> Result<(), String> {
    let count = tensor.shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
    let last = match &tensor.strides {
        None => count,
        Some(_) if count == Some(0) => Some(0),
        Some(strides) => tensor.shape.iter().zip(strides).try_fold(1usize, |span, (&n, &s)| {
            (n - 1).checked_mul(s).and_then(|step| span.checked_add(step))
        }),
    };
    let bytes = match (count, last) {
        (Some(count), Some(last)) if count < 1 << 40 && last < 1 << 40 => match tensor.strides {
            // Strided reads take the span; blocks have no strides.
            Some(_) => tensor.dtype.bytes(last),
            None => tensor.dtype.bytes(count),
        },
        _ => return Err(format!("has an impossible shape {:?}", tensor.shape)),
    };
    let bytes = bytes.ok_or_else(|| format!("has rows of no whole blocks: {:?}", tensor.shape))?;
    match tensor.offset.checked_add(bytes) {
        Some(end) if end <= file_bytes => Ok(()),
        _ => Err(format!("lies outside the file: {bytes} bytes at {} of {file_bytes}", tensor.offset)),
    }
}

/// What a file that can't be read seems to be.
fn describe(magic: &[u8], path: &Path) -> String {
    match magic {
        [] => "the file is empty".into(),
        [b'<', ..] => "it is a web page; the download went wrong".into(),
        b if b.starts_with(b"version https://") || b.starts_with(b"version http") => {
            "it is a Git LFS pointer; the file itself was never downloaded".into()
        }
        b if b.starts_with(&engine::format::MAGIC[..4]) => "it is an .sdq file already".into(),
        [0x80, 2..=5, ..] => "it is a pickle, but none that torch.save writes".into(),
        b if b.starts_with(b"\x89PNG") || b.starts_with(b"\xFF\xD8") => "it is a picture".into(),
        _ if path.extension().is_some_and(|e| e == "safetensors") => "its header is damaged".into(),
        _ => "its first bytes are of no known kind".into(),
    }
}

impl OpenFile {
    /// Reads `len` bytes at `offset`, which must be inside the file and not too many.
    fn bytes_at(&self, offset: u64, len: u64, what: &str) -> Result<Vec<u8>, Error> {
        if len > MAX_HEADER || offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::broken(&self.path, format!("{what} should be {len} bytes long")));
        }
        let mut bytes = vec![0; len as usize];
        read_exact_at(&self.file, &mut bytes, offset).map_err(Error::io("read", &self.path))?;
        Ok(bytes)
    }
}

/// Reads `buffer.len()` bytes from `offset`.
#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Reads `buffer.len()` bytes from `offset`.
#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}
