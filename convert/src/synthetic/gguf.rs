//! Writing GGUF, version 3.
#![forbid(unsafe_code)]

use std::path::Path;

use super::{Entry, Number, Out, Values};
use crate::error::Error;

const ALIGN: u64 = 32;

pub(super) fn write(path: &Path, entries: &[Entry], values: &Values<'_>) -> Result<(), Error> {
    let text = |out: &mut Out<'_>, text: &str| {
        out.put(&(text.len() as u64).to_le_bytes())?;
        out.put(text.as_bytes())
    };
    let mut out = Out::create(path)?;
    out.put(b"GGUF\x03\0\0\0")?;
    out.put(&(entries.len() as u64).to_le_bytes())?;
    out.put(&1u64.to_le_bytes())?;
    text(&mut out, "general.architecture")?;
    out.put(&8u32.to_le_bytes())?;
    text(&mut out, "sd")?;
    let mut at = 0;
    for entry in entries {
        text(&mut out, &entry.name)?;
        out.put(&(entry.shape.len() as u32).to_le_bytes())?;
        for &n in entry.shape.iter().rev() {
            out.put(&(n as u64).to_le_bytes())?;
        }
        let kind: u32 = match entry.number {
            Number::F32 => 0,
            Number::F16 => 1,
            Number::Bf16 => 30,
            Number::F8E4M3 | Number::F8E5M2 => unreachable!("refused before"),
        };
        out.put(&kind.to_le_bytes())?;
        out.put(&u64::to_le_bytes(at))?;
        at = (at + entry.len() as u64).next_multiple_of(ALIGN);
    }
    for entry in entries {
        out.pad(ALIGN)?;
        out.put(&entry.bytes(values))?;
    }
    out.finish()
}
