//! Writing safetensors.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::{Map, json};

use super::{Entry, Number, Out, Values};
use crate::error::Error;

pub(super) fn write(
    path: &Path,
    entries: &[Entry],
    values: &Values<'_>,
    number: Number,
) -> Result<(), Error> {
    let dtype = match number {
        Number::F32 => "F32",
        Number::F16 => "F16",
        Number::Bf16 => "BF16",
    };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0;
    for entry in entries {
        let end = at + entry.count() * number.bytes();
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
        out.put(&number.encode(&entry.values(values)))?;
    }
    out.finish()
}
