//! Opening a model file: everything is checked once, here.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kernels::layout::Weight;
use serde::de::DeserializeOwned;

use super::index::{Index, Part, Tensor};
use super::lost::Watch;
use super::{Error, MAGIC, PART_ALIGN, TENSOR_ALIGN, VERSION, checksum::xxh64, file};
use super::{FAULT_BYTES, FOLIO_BYTES};
use crate::card::{Card, VaeCard};
use crate::graph::weight::WeightKind;

pub(super) const HEADER_BYTES: usize = 32;
pub(super) const ENTRY_BYTES: usize = 32;
pub(super) const MAX_CARD: usize = 1 << 20;
pub(super) const MAX_TOKENIZER: usize = 64 << 20;
const MAX_SECTIONS: usize = 64;
/// Factors are at most this, and at least one over it.
const MAX_FACTOR: f32 = 16_777_216.0; // 2^24

/// A file of weights, mapped or built in, that has been checked.
#[derive(Debug)]
pub struct WeightFile {
    bytes: Bytes,
    name: String,
    sections: Sections,
    index: Index,
}

/// A file that holds a whole model.
#[derive(Debug)]
pub struct ModelFile {
    weights: WeightFile,
    card: Card,
    vocab: Range<usize>,
    merges: Range<usize>,
}

/// A file that holds a VAE, alone or in a model.
#[derive(Debug)]
pub struct VaeFile {
    weights: WeightFile,
    card: VaeCard,
}

impl Deref for ModelFile {
    type Target = WeightFile;

    fn deref(&self) -> &WeightFile {
        &self.weights
    }
}

impl Deref for VaeFile {
    type Target = WeightFile;

    fn deref(&self) -> &WeightFile {
        &self.weights
    }
}

#[derive(Debug)]
enum Bytes {
    Mapped {
        watch: Watch,
        map: memmap2::Mmap,
        file: File,
        path: PathBuf,
        /// When the file was last written to, as of opening it; `None` where the system doesn't tell.
        modified: Option<SystemTime>,
    },
    Static(&'static [u8]),
}

/// Data that starts at a multiple of 64, for a model built into the program:
/// `static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("model.sdq"));`
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Aligned<T: ?Sized>(pub T);

impl ModelFile {
    /// Maps the file and checks everything but the tensors' own checksums ([`WeightFile::verify`]).
    pub fn open(path: &Path) -> Result<ModelFile, Error> {
        ModelFile::check(WeightFile::open(path)?)
    }

    /// A model that is part of the program; see [`Aligned`].
    pub fn from_static(bytes: &'static [u8]) -> Result<ModelFile, Error> {
        ModelFile::check(WeightFile::from_static(bytes)?)
    }

    fn check(weights: WeightFile) -> Result<ModelFile, Error> {
        if weights.sections.range("card").is_none() && weights.sections.range("vae").is_some() {
            return Err(Error::VaeAlone { file: weights.name });
        }
        let (vocab, merges) =
            (weights.section("vocab", MAX_TOKENIZER)?, weights.section("merges", MAX_TOKENIZER)?);
        let card: Card = weights.card("card")?;
        card.check().map_err(|fault| weights.card_fault(fault))?;
        Ok(ModelFile { weights, card, vocab, merges })
    }

    /// Everything about the model but its weights.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The tokenizer's `vocab.json`.
    pub fn vocab(&self) -> &[u8] {
        &self.weights.bytes.as_slice()[self.vocab.clone()]
    }

    /// The tokenizer's `merges.txt`.
    pub fn merges(&self) -> &[u8] {
        &self.weights.bytes.as_slice()[self.merges.clone()]
    }
}

impl VaeFile {
    /// As [`ModelFile::open`]; of a model, its VAE.
    pub fn open(path: &Path) -> Result<VaeFile, Error> {
        let weights = WeightFile::open(path)?;
        let card: VaeCard = match weights.sections.range("vae") {
            Some(_) => weights.card("vae")?,
            None => weights
                .card::<Card>("card")
                .map(|Card { vae, provenance, .. }| VaeCard { vae, provenance })?,
        };
        card.check().map_err(|fault| weights.card_fault(fault))?;
        Ok(VaeFile { weights, card })
    }

    /// Whether it holds nothing else.
    pub fn is_alone(&self) -> bool {
        self.weights.sections.range("vae").is_some()
    }

    /// Everything about the VAE but its weights.
    pub fn card(&self) -> &VaeCard {
        &self.card
    }
}

impl WeightFile {
    fn open(path: &Path) -> Result<WeightFile, Error> {
        let fail = |action| move |source| Error::Io { action, path: path.to_owned(), source };
        let file = File::open(path).map_err(fail("open"))?;
        let meta = file.metadata().map_err(fail("open"))?;
        let name = path.display().to_string();
        if !meta.is_file() || meta.len() < HEADER_BYTES as u64 {
            return Err(Error::NotSdq { file: name });
        }
        let mut head = [0; HEADER_BYTES];
        file::read_exact_at(&file, &mut head, 0).map_err(fail("read"))?;
        check_header(&head, meta.len(), &name)?;
        let map = file::map(&file).map_err(fail("map"))?;
        let watch = Watch::new(&map);
        let modified = meta.modified().ok();
        WeightFile::check(Bytes::Mapped { watch, map, file, path: path.to_owned(), modified }, name)
    }

    fn from_static(bytes: &'static [u8]) -> Result<WeightFile, Error> {
        let name = "the built-in model";
        if !bytes.as_ptr().addr().is_multiple_of(TENSOR_ALIGN as usize) {
            let fault = format!("it doesn't start at a multiple of {TENSOR_ALIGN}");
            return Err(Error::Damaged { file: name.to_owned(), fault });
        }
        let Some((head, _)) = bytes.split_first_chunk() else {
            return Err(Error::NotSdq { file: name.to_owned() });
        };
        check_header(head, bytes.len() as u64, name)?;
        WeightFile::check(Bytes::Static(bytes), name.to_owned())
    }

    fn check(bytes: Bytes, name: String) -> Result<WeightFile, Error> {
        let fault = |fault: String| Error::Damaged { file: name.clone(), fault };
        let sections = Sections::read(bytes.as_slice()).map_err(fault)?;
        let mut file = WeightFile { bytes, name, sections, index: Index::default() };
        let (data, index) = (file.section("data", usize::MAX)?, file.section("index", usize::MAX)?);
        let data = data.start as u64..data.end as u64;
        file.index =
            Index::decode(&file.bytes.as_slice()[index], &data).map_err(|fault| file.damaged(fault))?;
        file.check_factors().map_err(|fault| file.damaged(fault))?;
        Ok(file)
    }

    fn damaged(&self, fault: String) -> Error {
        Error::Damaged { file: self.name.clone(), fault }
    }

    fn card_fault(&self, fault: String) -> Error {
        Error::Card { file: self.name.clone(), fault }
    }

    /// A section that must be there, of at most `limit` bytes.
    fn section(&self, tag: &str, limit: usize) -> Result<Range<usize>, Error> {
        let range = self.sections.range(tag).ok_or_else(|| self.damaged(format!("it has no {tag}")))?;
        if range.len() > limit {
            return Err(self.damaged(format!("its {tag} has {} bytes", range.len())));
        }
        Ok(range)
    }

    /// What the JSON of section `tag` says.
    fn card<C: DeserializeOwned>(&self, tag: &str) -> Result<C, Error> {
        let range = self.section(tag, MAX_CARD)?;
        serde_json::from_slice(&self.bytes.as_slice()[range]).map_err(|e| self.card_fault(e.to_string()))
    }

    fn check_factors(&self) -> Result<(), String> {
        let mut places: Vec<usize> = self.index.tensors.iter().filter_map(|t| t.factors).collect();
        places.dedup();
        for i in places {
            let sound = |f: &f32| (1.0 / MAX_FACTOR..=MAX_FACTOR).contains(f);
            if !self.vector(i).iter().all(sound) {
                return Err(format!("tensor {} has numbers that are no factors", self.index.tensors[i].name));
            }
        }
        Ok(())
    }

    /// The numbers of the vector at place `i` of the index.
    fn vector(&self, i: usize) -> &[f32] {
        bytemuck::cast_slice(self.bytes(&self.index.tensors[i]))
    }

    /// Networks, in execution order.
    pub fn parts(&self) -> &[Part] {
        &self.index.parts
    }

    /// The part of that name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.index.parts.iter().find(|p| p.name == name)
    }

    /// Tensors, in execution order, which is the order of their offsets.
    pub fn tensors(&self) -> &[Tensor] {
        &self.index.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.index.by_name.get(name).map(|&i| &self.index.tensors[i])
    }

    /// The bytes of a tensor of this file; they start at a multiple of 64.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.bytes.as_slice()[tensor.range()]
    }

    /// The numbers by which the inputs of a matrix of this file are multiplied: they stand for a matrix whose weights are
    /// larger by them.
    pub fn factors(&self, tensor: &Tensor) -> Option<&[f32]> {
        tensor.factors.map(|i| self.vector(i))
    }

    /// A matrix of this file, as the kernels take it.
    pub fn weight(&self, tensor: &Tensor) -> Option<Weight<'_>> {
        match tensor.kind {
            WeightKind::Matrix { .. } => {
                let shape = tensor.kind.shape().expect("a matrix has a shape");
                Some(Weight::new(tensor.encoding, shape, self.bytes(tensor)))
            }
            _ => None,
        }
    }

    /// Length of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.as_slice().len() as u64
    }

    /// Where the file lies; `None` for the built-in model.
    pub fn path(&self) -> Option<&Path> {
        match &self.bytes {
            Bytes::Mapped { path, .. } => Some(path),
            Bytes::Static(_) => None,
        }
    }

    /// The open file; `None` for the built-in model.
    pub fn file(&self) -> Option<&File> {
        match &self.bytes {
            Bytes::Mapped { file, .. } => Some(file),
            Bytes::Static(_) => None,
        }
    }

    /// Copies bytes of the file without going through the map, so that they count once in resident memory and a file
    /// cut short in the meantime is an error.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        match &self.bytes {
            Bytes::Mapped { file, path, .. } => file::read_exact_at(file, buffer, offset)
                .map_err(|source| Error::Io { action: "read", path: path.clone(), source }),
            Bytes::Static(bytes) => {
                let part = usize::try_from(offset).ok().and_then(|o| bytes.get(o..)?.get(..buffer.len()));
                let source = || io::ErrorKind::UnexpectedEof.into();
                let part =
                    part.ok_or_else(|| Error::Io { action: "read", path: PathBuf::new(), source: source() })?;
                buffer.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// Asks the system to have `range` of the file ready soon.
    pub(crate) fn prefetch(&self, range: &Range<usize>) {
        if let Bytes::Mapped { map, .. } = &self.bytes {
            file::prefetch(map, range);
        }
    }

    /// Takes `range` of the file out of this process's memory, until it is read again, with what the system has mapped around
    /// its ends: in the order of the file, what lies before is done with.
    pub(crate) fn release(&self, range: &Range<usize>) {
        if let Bytes::Mapped { map, .. } = &self.bytes {
            let start = range.start.saturating_sub(FOLIO_BYTES) / FAULT_BYTES * FAULT_BYTES;
            file::release(map, &(start..(range.end + FAULT_BYTES).min(map.len())));
        }
    }

    /// Fails where the file is not what was opened: parts were gone when they were read, it is shorter, or it has been
    /// written to. A file renamed over it is another one and changes nothing.
    pub(crate) fn still_there(&self) -> Result<(), Error> {
        let Bytes::Mapped { watch, map, file, path, modified } = &self.bytes else { return Ok(()) };
        let now = file.metadata().ok().filter(|now| !watch.lost() && now.len() >= map.len() as u64);
        let now = now.ok_or_else(|| Error::Lost { path: path.clone() })?;
        if now.modified().ok() == *modified { Ok(()) } else { Err(Error::Changed { path: path.clone() }) }
    }

    /// Compares every tensor with its checksum.
    pub fn verify(&self) -> Result<(), Error> {
        for tensor in self.tensors() {
            if xxh64(self.bytes(tensor)) != tensor.checksum {
                let fault = format!("tensor {} has changed", tensor.name);
                return Err(self.damaged(fault));
            }
        }
        Ok(())
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped { map, .. } => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8; 32], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn check_header(head: &[u8; HEADER_BYTES], found: u64, name: &str) -> Result<(), Error> {
    let file = name.to_owned();
    if head[..8] != MAGIC {
        return Err(Error::NotSdq { file });
    }
    if u32_at(head, 8) != VERSION {
        return Err(Error::Version { file, found: u32_at(head, 8) });
    }
    let expected = u64_at(head, 16);
    if expected != found {
        return Err(Error::Length { file, expected, found });
    }
    Ok(())
}

/// The section table, with its checksums compared.
#[derive(Debug)]
struct Sections(Vec<([u8; 8], Range<usize>)>);

impl Sections {
    fn read(all: &[u8]) -> Result<Sections, String> {
        let head = all.first_chunk::<HEADER_BYTES>().expect("the header has been read");
        let count = u32_at(head, 12) as usize;
        if count > MAX_SECTIONS {
            return Err(format!("it speaks of {count} sections"));
        }
        let table_end = HEADER_BYTES + ENTRY_BYTES * count;
        let checksum =
            all.get(table_end..).and_then(|rest| rest.first_chunk()).copied().map(u64::from_le_bytes);
        if checksum != Some(xxh64(&all[..table_end.min(all.len())])) {
            return Err(String::from("the header's checksum is wrong"));
        }
        let (entries, _) = all[HEADER_BYTES..table_end].as_chunks::<ENTRY_BYTES>();
        let mut sections: Vec<([u8; 8], Range<usize>)> = Vec::with_capacity(count);
        let mut end = table_end + 8;
        for entry in entries {
            let tag: [u8; 8] = std::array::from_fn(|i| entry[i]);
            let text = String::from_utf8_lossy(&tag).trim_end_matches('\0').to_owned();
            let (offset, len) = (u64_at(entry, 8) as usize, u64_at(entry, 16) as usize);
            let is_data = text == "data";
            let align = if is_data { PART_ALIGN } else { TENSOR_ALIGN };
            let range = match offset.checked_add(len) {
                Some(stop) if offset >= end && stop <= all.len() && offset.is_multiple_of(align as usize) => {
                    offset..stop
                }
                _ => return Err(format!("section {text:?} is out of place")),
            };
            if !is_data && xxh64(&all[range.clone()]) != u64_at(entry, 24) {
                return Err(format!("the checksum of section {text:?} is wrong"));
            }
            if sections.iter().any(|(other, _)| *other == tag) {
                return Err(format!("section {text:?} is there twice"));
            }
            end = range.end;
            sections.push((tag, range));
        }
        if end != all.len() {
            return Err(String::from("the last section doesn't end where the file ends"));
        }
        Ok(Sections(sections))
    }

    fn range(&self, tag: &str) -> Option<Range<usize>> {
        let wanted = super::writer::tag(tag);
        self.0.iter().find(|(tag, _)| *tag == wanted).map(|(_, range)| range.clone())
    }
}
