//! GGUF: typed key-value pairs, then names, shapes, types and places of tensors (ggml's `gguf.md`).
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::gguf_blocks::Block;
use super::{OpenFile, RawTensor};
use crate::dtype::Dtype;
use crate::error::Error;

/// Longest part before the numbers; vocabularies are the longest thing in it.
const MAX_HEAD: u64 = 128 << 20;
const MAX_TENSORS: u64 = 1 << 20;
const MAX_DIMS: u32 = 8;
/// Under this key and a tensor's name stands the shape it had before it was folded into rows of whole blocks.
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";

pub(super) fn read(file: &OpenFile) -> Result<Vec<(String, RawTensor)>, Error> {
    let broken = |fault: String| Error::broken(&file.path, fault);
    let head = file.bytes_at(0, file.len.min(MAX_HEAD), "its head")?;
    parse(&head).map_err(broken)
}

fn parse(head: &[u8]) -> Result<Vec<(String, RawTensor)>, String> {
    let mut reader = Reader { bytes: head, at: 4 };
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("it has version {version} of GGUF"));
    }
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    if tensors > MAX_TENSORS {
        return Err(format!("it speaks of {tensors} tensors"));
    }
    let mut align = 32;
    let mut shapes: HashMap<String, Vec<usize>> = HashMap::new();
    for _ in 0..pairs {
        let key = reader.text()?;
        let kind = reader.u32()?;
        let numbers = reader.value(kind, 0)?;
        if key == "general.alignment" {
            align = numbers.first().copied().unwrap_or(0);
        } else if let Some(name) = key.strip_prefix(ORIGINAL_SHAPE) {
            shapes.insert(name.to_owned(), numbers.iter().map(|&n| n as usize).collect());
        }
    }
    if !align.is_power_of_two() || align > 1 << 20 {
        return Err(format!("its tensors are aligned to {align}"));
    }
    let mut found = Vec::new();
    for _ in 0..tensors {
        let name = reader.text()?;
        let dims = reader.u32()?;
        if dims > MAX_DIMS {
            return Err(format!("tensor {name} has {dims} dimensions"));
        }
        let mut shape = (0..dims).map(|_| reader.u64().map(|n| n as usize)).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let kind = reader.u32()?;
        let dtype = dtype(kind).ok_or_else(|| format!("tensor {name} has the unknown type {kind}"))?;
        let offset = reader.u64()?;
        let count = |shape: &[usize]| shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        if let Some(original) =
            shapes.remove(&name).filter(|s| count(s).is_some() && count(s) == count(&shape))
        {
            shape = original;
        }
        found.push((name, RawTensor { shape, dtype, file: 0, offset, strides: None }));
    }
    let data = (reader.at as u64).next_multiple_of(align);
    for (name, tensor) in &mut found {
        tensor.offset =
            data.checked_add(tensor.offset).ok_or_else(|| format!("tensor {name} lies outside the file"))?;
    }
    Ok(found)
}

fn dtype(kind: u32) -> Option<Dtype> {
    Some(match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        24 => Dtype::Other("i8", 1),
        25 => Dtype::Other("i16", 2),
        26 => Dtype::Other("i32", 4),
        27 => Dtype::Other("i64", 8),
        28 => Dtype::F64,
        30 => Dtype::Bf16,
        kind => Dtype::Block(Block::of(kind)?),
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, len: u64) -> Result<&[u8], String> {
        let len = usize::try_from(len).ok();
        let taken = len.and_then(|len| self.bytes.get(self.at..)?.get(..len));
        let taken = taken.ok_or("its head is cut short or too long")?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes")))
    }

    fn text(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        String::from_utf8(self.take(len)?.to_vec()).map_err(|_| "a name is no UTF-8".into())
    }

    /// Passes over a value; whole numbers and short lists of them are returned.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Vec<u64>, String> {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        Ok(match kind {
            0 | 1 | 7 => vec![number(self.take(1)?)],
            2 | 3 => vec![number(self.take(2)?)],
            4 | 5 => vec![number(self.take(4)?)],
            10 | 11 => vec![number(self.take(8)?)],
            6 => self.take(4).map(|_| Vec::new())?,
            12 => self.take(8).map(|_| Vec::new())?,
            8 => {
                let len = self.u64()?;
                self.take(len).map(|_| Vec::new())?
            }
            9 if depth < 4 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let mut numbers = Vec::new();
                for _ in 0..count {
                    let value = self.value(kind, depth + 1)?;
                    if numbers.len() < MAX_DIMS as usize {
                        numbers.extend(value);
                    }
                }
                numbers
            }
            _ => return Err(format!("a value has the unknown type {kind}")),
        })
    }
}
