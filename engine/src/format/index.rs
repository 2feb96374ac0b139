//! The tensor index: its records in memory and in the file.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ops::Range;

use kernels::layout::Encoding;

use super::{PART_ALIGN, TENSOR_ALIGN};
use crate::graph::weight::{OutputOrder, WeightKind};

const MAX_PARTS: usize = 64;
const MAX_TENSORS: usize = 1 << 20;
const MAX_NAME: usize = 512;
const MAX_DIM: usize = 1 << 20;
const MAX_VECTOR: usize = 1 << 24;
const MAX_TAP: usize = 16;

const HEAD_BYTES: usize = 8;
const PART_BYTES: usize = 40;
const TENSOR_BYTES: usize = 64;

/// One tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Canonical name, for example `unet.conv_in.weight`.
    pub name: String,
    /// What it is and how large.
    pub kind: WeightKind,
    /// How its numbers are stored: f32 for vectors, f16 for tables.
    pub encoding: Encoding,
    /// Of a matrix: place of the vector by which its inputs are multiplied.
    pub factors: Option<usize>,
    /// Where it begins, in bytes from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// XXH64 of its bytes.
    pub checksum: u64,
}

impl Tensor {
    /// Its bytes, counted from the start of the file.
    pub fn range(&self) -> Range<usize> {
        self.offset as usize..(self.offset + self.len) as usize
    }
}

/// A network that holds memory on its own: a run of tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// `text_encoder`, `unet`, `vae_decoder`, ...
    pub name: String,
    /// Its tensors, as places in the index.
    pub tensors: Range<usize>,
    /// Where it begins, in bytes from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Everything the index section says.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    pub(super) parts: Vec<Part>,
    pub(super) tensors: Vec<Tensor>,
    /// Place of each name in `tensors`.
    pub(super) by_name: HashMap<String, usize>,
}

/// Bytes of a tensor of this kind, or what is wrong with the kind.
pub(super) fn stored_bytes(kind: &WeightKind, encoding: Encoding) -> Result<u64, String> {
    let dim = |name: &str, value: usize, max: usize| match value {
        0 => Err(format!("{name} is 0")),
        _ if value > max => Err(format!("{name} is {value}, more than {max}")),
        _ => Ok(()),
    };
    let even = |order: OutputOrder, n: usize| match order {
        OutputOrder::Geglu if !n.is_multiple_of(2) => Err(format!("{n} outputs can't be values and gates")),
        _ => Ok(()),
    };
    match *kind {
        WeightKind::Matrix { n, kh, kw, k, order } => {
            dim("n", n, MAX_DIM)?;
            dim("k", k, MAX_DIM)?;
            dim("kh", kh, MAX_TAP)?;
            dim("kw", kw, MAX_TAP)?;
            even(order, n)?;
            let shape = kind.shape().expect("a matrix has a shape");
            Ok(shape.bytes(encoding) as u64)
        }
        WeightKind::Vector { len, order } => {
            dim("len", len, MAX_VECTOR)?;
            even(order, len)?;
            fixed(encoding, Encoding::F32)?;
            Ok(order.stored(len) as u64 * 4)
        }
        WeightKind::Table { rows, cols } => {
            dim("rows", rows, MAX_DIM)?;
            dim("cols", cols, MAX_DIM)?;
            fixed(encoding, Encoding::F16)?;
            Ok(rows as u64 * cols as u64 * 2)
        }
    }
}

fn fixed(found: Encoding, only: Encoding) -> Result<(), String> {
    if found == only { Ok(()) } else { Err(format!("{} where only {} can be", found.name(), only.name())) }
}

pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(format!("something is named {:?}", name.chars().take(64).collect::<String>()));
    }
    Ok(())
}

impl Index {
    /// Bytes of the section.
    pub(super) fn section_bytes(&self) -> u64 {
        let names = self.parts.iter().map(|p| p.name.len()).chain(self.tensors.iter().map(|t| t.name.len()));
        let records = HEAD_BYTES + PART_BYTES * self.parts.len() + TENSOR_BYTES * self.tensors.len();
        (records + names.sum::<usize>()) as u64
    }

    /// The section.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.section_bytes() as usize);
        let mut names = Vec::new();
        let mut name = |out: &mut Vec<u8>, text: &str| {
            put_u32(out, names.len());
            put_u32(out, text.len());
            names.extend_from_slice(text.as_bytes());
        };
        put_u32(&mut out, self.parts.len());
        put_u32(&mut out, self.tensors.len());
        for part in &self.parts {
            name(&mut out, &part.name);
            put_u32(&mut out, part.tensors.start);
            put_u32(&mut out, part.tensors.len());
            for value in [part.offset, part.len, 0] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        for tensor in &self.tensors {
            name(&mut out, &tensor.name);
            let (kind, order, dims) = match tensor.kind {
                WeightKind::Matrix { n, kh, kw, k, order } => (0, order, [n, kh, kw, k]),
                WeightKind::Vector { len, order } => (1, order, [len, 0, 0, 0]),
                WeightKind::Table { rows, cols } => (2, OutputOrder::Plain, [rows, cols, 0, 0]),
            };
            let encoding =
                Encoding::ALL.iter().position(|&e| e == tensor.encoding).expect("ALL has every encoding");
            out.extend_from_slice(&[kind, encoding as u8, u8::from(order == OutputOrder::Geglu), 0]);
            put_u32(&mut out, tensor.factors.map_or(0, |i| i + 1));
            dims.iter().for_each(|&d| put_u32(&mut out, d));
            for value in [tensor.offset, tensor.len, tensor.checksum, 0] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        out.extend_from_slice(&names);
        out
    }

    /// Factors are a vector of the same part, one for each input of a matrix.
    pub(super) fn check_factors(&self, part: &Part) -> Result<(), String> {
        for tensor in &self.tensors[part.tensors.clone()] {
            let Some(i) = tensor.factors else { continue };
            let kind = part.tensors.contains(&i).then(|| self.tensors[i].kind);
            match (tensor.kind, kind) {
                (
                    WeightKind::Matrix { k, .. },
                    Some(WeightKind::Vector { len, order: OutputOrder::Plain }),
                ) if len == k => {}
                _ => return Err(format!("tensor {}: tensor {i} can't be its factors", tensor.name)),
            }
        }
        Ok(())
    }

    /// Reads and checks the section; `data` is where the data section lies in the file.
    pub(super) fn decode(bytes: &[u8], data: &Range<u64>) -> Result<Index, String> {
        let short = || String::from("the index is too short");
        let mut records = Cursor(bytes);
        let (parts, tensors) = (records.u32().ok_or_else(short)?, records.u32().ok_or_else(short)?);
        if parts > MAX_PARTS || tensors > MAX_TENSORS {
            return Err(format!("the index speaks of {parts} parts and {tensors} tensors"));
        }
        let names =
            bytes.get(HEAD_BYTES + PART_BYTES * parts + TENSOR_BYTES * tensors..).ok_or_else(short)?;
        let mut index = Index::default();
        let mut place = Place { end: data.start, limit: data.end };
        for _ in 0..parts {
            let part = records.part(names).ok_or_else(short)??;
            place
                .follow(part.offset, part.len, PART_ALIGN)
                .map_err(|e| format!("part {}: {e}", part.name))?;
            if index.parts.iter().any(|p| p.name == part.name) {
                return Err(format!("part {} is there twice", part.name));
            }
            let first = index.parts.last().map_or(0, |p: &Part| p.tensors.end);
            if part.tensors.start != first || part.tensors.end > tensors {
                return Err(format!("part {} has tensors that aren't its own", part.name));
            }
            index.parts.push(part);
        }
        if index.parts.last().map_or(0, |p| p.tensors.end) != tensors {
            return Err(String::from("some tensors belong to no part"));
        }
        for part in index.parts.clone() {
            let mut place = Place { end: part.offset, limit: part.offset + part.len };
            for i in part.tensors.clone() {
                let tensor = records.tensor(names).ok_or_else(short)??;
                let fault = |e: String| format!("tensor {}: {e}", tensor.name);
                if stored_bytes(&tensor.kind, tensor.encoding).map_err(fault)? != tensor.len {
                    return Err(fault(format!("{} bytes don't fit its shape", tensor.len)));
                }
                place.follow(tensor.offset, tensor.len, TENSOR_ALIGN).map_err(fault)?;
                if index.by_name.insert(tensor.name.clone(), i).is_some() {
                    return Err(fault(String::from("it is there twice")));
                }
                index.tensors.push(tensor);
            }
            index.check_factors(&part)?;
        }
        Ok(index)
    }
}

/// Checks that ranges ascend, don't overlap and stay inside a limit.
struct Place {
    end: u64,
    limit: u64,
}

impl Place {
    fn follow(&mut self, offset: u64, len: u64, align: u64) -> Result<(), String> {
        let end = offset.checked_add(len).filter(|&end| end <= self.limit);
        match end {
            Some(end) if offset >= self.end && offset.is_multiple_of(align) => {
                self.end = end;
                Ok(())
            }
            _ => Err(format!("{len} bytes at {offset} are out of place")),
        }
    }
}

/// Takes records off the front; `None` where the bytes end.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u32(&mut self) -> Option<usize> {
        self.take().map(|b| u32::from_le_bytes(b) as usize)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn name(&mut self, names: &[u8]) -> Option<Result<String, String>> {
        let (offset, len) = (self.u32()?, self.u32()?);
        let text = names.get(offset..).and_then(|n| n.get(..len)).and_then(|n| std::str::from_utf8(n).ok());
        Some(match text {
            Some(text) => check_name(text).map(|()| text.to_owned()),
            None => Err(String::from("a name is out of place or not UTF-8")),
        })
    }

    fn part(&mut self, names: &[u8]) -> Option<Result<Part, String>> {
        let name = self.name(names)?;
        let (first, count) = (self.u32()?, self.u32()?);
        let (offset, len, _) = (self.u64()?, self.u64()?, self.u64()?);
        Some(name.map(|name| Part { name, tensors: first..first + count, offset, len }))
    }

    fn tensor(&mut self, names: &[u8]) -> Option<Result<Tensor, String>> {
        let name = self.name(names)?;
        let [kind, encoding, order, _] = self.take::<4>()?;
        let factors = self.u32()?.checked_sub(1);
        let dims = [self.u32()?, self.u32()?, self.u32()?, self.u32()?];
        let (offset, len, checksum, _) = (self.u64()?, self.u64()?, self.u64()?, self.u64()?);
        Some(name.and_then(|name| {
            let unknown = |what: &str| format!("tensor {name} has an unknown {what}");
            let order = match order {
                0 => OutputOrder::Plain,
                1 => OutputOrder::Geglu,
                _ => return Err(unknown("order")),
            };
            let kind = match (kind, dims) {
                (0, [n, kh, kw, k]) => WeightKind::Matrix { n, kh, kw, k, order },
                (1, [len, 0, 0, 0]) => WeightKind::Vector { len, order },
                (2, [rows, cols, 0, 0]) => WeightKind::Table { rows, cols },
                _ => return Err(unknown("kind")),
            };
            let encoding = *Encoding::ALL.get(usize::from(encoding)).ok_or_else(|| unknown("encoding"))?;
            Ok(Tensor { name, kind, encoding, factors, offset, len, checksum })
        }))
    }
}

fn put_u32(out: &mut Vec<u8>, value: usize) {
    let value = u32::try_from(value).expect("counts and sizes in the index are below 2^32");
    out.extend_from_slice(&value.to_le_bytes());
}
