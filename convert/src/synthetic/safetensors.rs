//! Writing safetensors.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::{Map, json};

use super::{Entry, Number, Out, Values};
use crate::error::Error;

pub(super) fn write(path: &Path, entries: &[Entry], values: &Values<'_>) -> Result<(), Error> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0;
    for entry in entries {
        let dtype = match entry.number {
            Number::F32 => "F32",
            Number::F16 => "F16",
            Number::Bf16 => "BF16",
            Number::F8E4M3 => "F8_E4M3",
            Number::F8E5M2 => "F8_E5M2",
        };
        let end = at + entry.len();
        let value = json!({ "dtype": dtype, "shape": entry.shape, "data_offsets": [at, end] });
        header.insert(entry.name.clone(), value);
        at = end;
    }
    let mut header = serde_json::to_vec(&header).expect("a header is plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = Out::create(path)?;
    out.put(&(header.len() as u64).to_le_bytes())?;
    out.put(&header)?;
    for entry in entries {
        out.put(&entry.bytes(values))?;
    }
    out.finish()
}
