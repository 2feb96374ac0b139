//! The safetensors header: a JSON object of names, types, shapes and places.
#![forbid(unsafe_code)]

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{OpenFile, RawTensor};
use crate::dtype::Dtype;
use crate::error::Error;

/// Longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Entries in the order of the file, so that a name that is there twice is seen.
struct Header(Vec<(String, Entry)>);

pub(super) fn read(file: &OpenFile) -> Result<Vec<(String, RawTensor)>, Error> {
    let broken = |fault: String| Error::broken(&file.path, fault);
    let head = file.bytes_at(0, 8, "the length of its header")?;
    let len = u64::from_le_bytes(head.try_into().expect("eight bytes"));
    if len > MAX_HEADER || len > file.len - 8 {
        return Err(broken(format!("its header should be {len} bytes long, the file has {}", file.len)));
    }
    let header = file.bytes_at(8, len, "its header")?;
    let Header(entries) = serde_json::from_slice(&header).map_err(|e| broken(format!("its header: {e}")))?;

    let data = 8 + len;
    let mut places: Vec<([u64; 2], &str)> =
        entries.iter().map(|(n, e)| (e.data_offsets, n.as_str())).collect();
    places.sort_unstable();
    let mut end = 0;
    for ([start, stop], name) in places {
        if start < end || stop < start {
            return Err(broken(format!("tensor {name} overlaps another")));
        }
        end = stop;
    }
    if end > file.len - data {
        return Err(broken(format!("its tensors need {} bytes, the file has {}", data + end, file.len)));
    }
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape, data_offsets: [start, stop] }) in entries {
        let Some(dtype) = dtype_of(&dtype) else {
            return Err(broken(format!("tensor {name} has the unknown type {dtype}")));
        };
        let count = shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        if count.and_then(|count| dtype.bytes(count)) != Some(stop - start) {
            return Err(broken(format!(
                "tensor {name}: {} bytes aren't {} {shape:?}",
                stop - start,
                dtype.name()
            )));
        }
        tensors.push((name, RawTensor { shape, dtype, file: 0, offset: data + start, strides: None }));
    }
    Ok(tensors)
}

fn dtype_of(name: &str) -> Option<Dtype> {
    Some(match name {
        "F64" => Dtype::F64,
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        "F8_E4M3" => Dtype::F8E4M3,
        "F8_E5M2" => Dtype::F8E5M2,
        "I64" => Dtype::Other("i64", 8),
        "U64" => Dtype::Other("u64", 8),
        "C64" => Dtype::Other("c64", 8),
        "I32" => Dtype::Other("i32", 4),
        "U32" => Dtype::Other("u32", 4),
        "I16" => Dtype::Other("i16", 2),
        "U16" => Dtype::Other("u16", 2),
        "I8" => Dtype::Other("i8", 1),
        "U8" => Dtype::Other("u8", 1),
        "BOOL" => Dtype::Other("bool", 1),
        "F8_E8M0" => Dtype::Other("f8_e8m0", 1),
        _ => return None,
    })
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
