//! Writing a model file: its length is known before the first byte, tensors come from several threads in any order, and
//! it appears complete or not at all.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::index::{Index, Part, Tensor, check_name, stored_bytes};
use super::reader::{ENTRY_BYTES, HEADER_BYTES, MAX_CARD, MAX_TOKENIZER};
use super::{Error, MAGIC, PART_ALIGN, TENSOR_ALIGN, VERSION, checksum::xxh64, file};
use crate::card::{Card, VaeCard};
use crate::graph::weight::{Stored, WeightSpec};

/// The tokenizer's files, as they are.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    /// `vocab.json`.
    pub vocab: &'a [u8],
    /// `merges.txt`.
    pub merges: &'a [u8],
}

/// Where everything in a file will lie.
#[derive(Debug)]
pub struct Layout {
    index: Index,
    /// Tag, offset, bytes; `index` and `data` without their bytes.
    sections: Vec<Section>,
    file_bytes: u64,
}

#[derive(Debug)]
struct Section {
    tag: &'static str,
    offset: u64,
    len: u64,
    bytes: Vec<u8>,
}

impl Layout {
    /// Lays out a file of these parts, each with its tensors in execution order, vectors of factors among them.
    pub fn new(
        card: &Card,
        tokenizer: Tokenizer<'_>,
        parts: &[(&str, Vec<(WeightSpec, Stored)>)],
    ) -> Result<Layout, Error> {
        card.check().map_err(fault)?;
        let card = serde_json::to_vec(card).expect("a card is plain data");
        let texts = vec![
            ("card", card, MAX_CARD),
            ("vocab", tokenizer.vocab.to_vec(), MAX_TOKENIZER),
            ("merges", tokenizer.merges.to_vec(), MAX_TOKENIZER),
        ];
        Layout::with(texts, parts)
    }

    /// The same for a VAE alone.
    pub fn of_vae(card: &VaeCard, parts: &[(&str, Vec<(WeightSpec, Stored)>)]) -> Result<Layout, Error> {
        card.check().map_err(fault)?;
        let card = serde_json::to_vec(card).expect("a card is plain data");
        Layout::with(vec![("vae", card, MAX_CARD)], parts)
    }

    /// With the sections `texts`, each of a tag, bytes, and how many these may be; the index follows the first.
    fn with(
        texts: Vec<(&'static str, Vec<u8>, usize)>,
        parts: &[(&str, Vec<(WeightSpec, Stored)>)],
    ) -> Result<Layout, Error> {
        for (what, bytes, limit) in &texts {
            if bytes.len() > *limit {
                return Err(fault(format!("its {what} has {} bytes", bytes.len())));
            }
        }
        let mut index = Index::default();
        for (part, tensors) in parts {
            check_name(part).map_err(fault)?;
            let first = index.tensors.len();
            for (spec, stored) in tensors {
                check_name(&spec.name).map_err(fault)?;
                let wrong = |e: String| fault(format!("tensor {}: {e}", spec.name));
                let encoding = stored.encoding.or(spec.kind.fixed_encoding());
                let encoding = encoding.ok_or_else(|| wrong("it has no encoding".into()))?;
                let len = stored_bytes(&spec.kind, encoding).map_err(wrong)?;
                let (name, kind, factors) = (spec.name.clone(), spec.kind, None);
                if index.by_name.insert(name.clone(), index.tensors.len()).is_some() {
                    return Err(fault(format!("tensor {name} is there twice")));
                }
                index.tensors.push(Tensor { name, kind, encoding, factors, offset: 0, len, checksum: 0 });
            }
            for (i, (spec, stored)) in tensors.iter().enumerate() {
                let Some(name) = &stored.factors else { continue };
                let place = index.by_name.get(name).copied();
                let missing = || fault(format!("tensor {}: there are no factors {name}", spec.name));
                index.tensors[first + i].factors = Some(place.ok_or_else(missing)?);
            }
            let tensors = first..index.tensors.len();
            let part = Part { name: (*part).to_owned(), tensors, offset: 0, len: 0 };
            index.check_factors(&part).map_err(fault)?;
            index.parts.push(part);
        }

        // Beside the texts: index and data.
        let mut end = (HEADER_BYTES + ENTRY_BYTES * (texts.len() + 2) + 8) as u64;
        let mut sections = Vec::new();
        let mut texts: Vec<(&str, u64, Vec<u8>)> =
            texts.into_iter().map(|(tag, bytes, _)| (tag, bytes.len() as u64, bytes)).collect();
        texts.insert(1, ("index", index.section_bytes(), Vec::new()));
        for (tag, len, bytes) in texts {
            let offset = end.next_multiple_of(TENSOR_ALIGN);
            sections.push(Section { tag, offset, len, bytes });
            end = offset + len;
        }
        let data = end.next_multiple_of(PART_ALIGN);
        end = data;
        for part in &mut index.parts {
            part.offset = end.next_multiple_of(PART_ALIGN);
            end = part.offset;
            for tensor in &mut index.tensors[part.tensors.clone()] {
                tensor.offset = end;
                end = (end + tensor.len).next_multiple_of(TENSOR_ALIGN);
            }
            part.len = end - part.offset;
        }
        sections.push(Section { tag: "data", offset: data, len: end - data, bytes: Vec::new() });
        Ok(Layout { index, sections, file_bytes: end })
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Tensors in the order given, with their offsets.
    pub fn tensors(&self) -> &[Tensor] {
        &self.index.tensors
    }

    /// Networks, in execution order.
    pub fn parts(&self) -> &[Part] {
        &self.index.parts
    }

    /// Everything before the data, once the tensors' checksums are known.
    fn head(&mut self) -> Vec<u8> {
        let index = self.index.encode();
        self.sections.iter_mut().find(|s| s.tag == "index").expect("every layout has one").bytes = index;
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.sections.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.file_bytes.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        for section in &self.sections {
            let checksum = if section.tag == "data" { 0 } else { xxh64(&section.bytes) };
            out.extend_from_slice(&tag(section.tag));
            for value in [section.offset, section.len, checksum] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        let checksum = xxh64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        for section in self.sections.iter().filter(|s| !s.bytes.is_empty()) {
            out.resize(section.offset as usize, 0);
            out.extend_from_slice(&section.bytes);
        }
        out
    }
}

fn fault(fault: String) -> Error {
    Error::Card { file: String::from("the new file"), fault }
}

/// A section's tag as it stands in the table.
pub(super) fn tag(text: &str) -> [u8; 8] {
    let mut tag = [0; 8];
    tag[..text.len()].copy_from_slice(text.as_bytes());
    tag
}

/// A file in the making: a temporary one beside the target until [`Writer::finish`]. Dropped before that, it is removed.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    temporary: Temporary,
    file: File,
    layout: Layout,
    checksums: Vec<AtomicU64>,
    written: Vec<AtomicBool>,
}

/// Removes its file when dropped.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing is left to do about a file that can't be removed.
        let _ = fs::remove_file(&self.0);
    }
}

impl Writer {
    /// Sets the space for the whole file aside. An existing `target` is replaced by [`Writer::finish`].
    pub fn create(target: &Path, layout: Layout) -> Result<Writer, Error> {
        let fail = |source| Error::Io { action: "write", path: target.to_owned(), source };
        let name = target.file_name().ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        static COUNT: AtomicU64 = AtomicU64::new(0);
        hidden.push(format!(".{}-{}.part", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let path = target.with_file_name(hidden);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(fail)?;
        let temporary = Temporary(path);
        file::reserve(&file, layout.file_bytes).map_err(|source| out_of(&layout, target, source))?;
        let count = layout.index.tensors.len();
        Ok(Writer {
            target: target.to_owned(),
            temporary,
            file,
            layout,
            checksums: (0..count).map(|_| AtomicU64::new(0)).collect(),
            written: (0..count).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    /// Where everything lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Writes tensor `i` of the layout.
    ///
    /// # Panics
    /// Where `bytes` isn't as long as the layout says.
    pub fn write(&self, i: usize, bytes: &[u8]) -> Result<(), Error> {
        let tensor = &self.layout.index.tensors[i];
        assert_eq!(bytes.len() as u64, tensor.len, "tensor {}", tensor.name);
        file::write_all_at(&self.file, bytes, tensor.offset)
            .map_err(|source| out_of(&self.layout, &self.target, source))?;
        self.checksums[i].store(xxh64(bytes), Ordering::Relaxed);
        self.written[i].store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Writes what stands before the data and gives the file its name. Returns its length.
    ///
    /// # Panics
    /// Where a tensor is missing.
    pub fn finish(mut self) -> Result<u64, Error> {
        for (i, tensor) in self.layout.index.tensors.iter_mut().enumerate() {
            assert!(self.written[i].load(Ordering::Relaxed), "tensor {} was never written", tensor.name);
            tensor.checksum = self.checksums[i].load(Ordering::Relaxed);
        }
        let head = self.layout.head();
        let fail = |source| out_of(&self.layout, &self.target, source);
        file::write_all_at(&self.file, &head, 0).map_err(fail)?;
        self.file.sync_all().map_err(fail)?;
        fs::rename(&self.temporary.0, &self.target).map_err(fail)?;
        #[cfg(unix)]
        if let Some(folder) = self.target.parent() {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder).and_then(|f| f.sync_all()).map_err(fail)?;
        }
        Ok(self.layout.file_bytes)
    }
}

fn out_of(layout: &Layout, path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::NoSpace { path: path.to_owned(), needed: layout.file_bytes }
        }
        _ => Error::Io { action: "write", path: path.to_owned(), source },
    }
}
