//! The directory of a zip: where stored files lie (PKWARE's APPNOTE, sections 4.3 and 4.5).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::OpenFile;
use crate::error::Error;

/// A stored file inside the zip.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) offset: u64,
    pub(super) len: u64,
}

const END: &[u8] = b"PK\x05\x06";
const END_BYTES: usize = 22;
const END64: &[u8] = b"PK\x06\x06";
const LOCATOR: &[u8] = b"PK\x06\x07";
const LOCATOR_BYTES: u64 = 20;
const ENTRY: &[u8] = b"PK\x01\x02";
const ENTRY_BYTES: usize = 46;
const LOCAL: &[u8] = b"PK\x03\x04";
const LOCAL_BYTES: u64 = 30;

/// Every file of the zip, by its name.
pub(super) fn members(file: &OpenFile) -> Result<BTreeMap<String, Member>, Error> {
    let broken = |fault: &str| Error::broken(&file.path, format!("its zip {fault}"));
    let (offset, len) = directory(file)?;
    let directory = file.bytes_at(offset, len, "its zip's directory")?;
    let mut rest = directory.as_slice();
    let mut members = BTreeMap::new();
    while let Some(entry) = rest.get(..ENTRY_BYTES).filter(|e| e.starts_with(ENTRY)) {
        let (name_len, extra_len, comment) = (u16_at(entry, 28), u16_at(entry, 30), u16_at(entry, 32));
        let whole = ENTRY_BYTES + name_len + extra_len + comment;
        let tail = rest.get(ENTRY_BYTES..whole).ok_or_else(|| broken("has a directory cut short"))?;
        let name =
            std::str::from_utf8(&tail[..name_len]).map_err(|_| broken("has a name that is no UTF-8"))?;
        let stored = u16_at(entry, 10) == 0;
        let mut long = long_fields(&tail[name_len..name_len + extra_len]);
        let mut field = |short: u32| match short {
            u32::MAX => long.next().ok_or_else(|| broken("lacks a length")),
            short => Ok(u64::from(short)),
        };
        // The order of the long fields is fixed: length, packed length, offset.
        let len = field(u32_at(entry, 24))?;
        let packed = field(u32_at(entry, 20))?;
        let header = field(u32_at(entry, 42))?;
        if !stored || packed != len {
            return Err(broken(&format!("has the compressed file {name}, which torch never writes")));
        }
        let local = file.bytes_at(header, LOCAL_BYTES, "a file of its zip")?;
        if !local.starts_with(LOCAL) {
            return Err(broken(&format!("has no file {name} where it should be")));
        }
        let offset = header + LOCAL_BYTES + u16_at(&local, 26) as u64 + u16_at(&local, 28) as u64;
        if offset.checked_add(len).is_none_or(|end| end > file.len) {
            return Err(broken(&format!("has the file {name} reaching past its end")));
        }
        if members.insert(name.to_owned(), Member { offset, len }).is_some() {
            return Err(broken(&format!("has the file {name} twice")));
        }
        rest = &rest[whole..];
    }
    if rest.is_empty() { Ok(members) } else { Err(broken("has a directory with other things in it")) }
}

/// Offset and length of the directory.
fn directory(file: &OpenFile) -> Result<(u64, u64), Error> {
    let broken = |fault: &str| Error::broken(&file.path, format!("its zip {fault}"));
    // A comment of up to 65535 bytes may follow the end record.
    let tail_len = file.len.min(END_BYTES as u64 + 0xFFFF);
    let tail_at = file.len - tail_len;
    let tail = file.bytes_at(tail_at, tail_len, "its zip's end")?;
    let at = tail.windows(END.len()).rposition(|w| w == END);
    let at = at
        .filter(|at| tail.len() - at >= END_BYTES)
        .ok_or_else(|| broken("has no end: the file is cut short"))?;
    let end = &tail[at..];
    let (len, offset) = (u32_at(end, 12), u32_at(end, 16));
    if offset != u32::MAX && len != u32::MAX {
        return Ok((u64::from(offset), u64::from(len)));
    }
    let locator_at =
        (tail_at + at as u64).checked_sub(LOCATOR_BYTES).ok_or_else(|| broken("lacks a record"))?;
    let locator = file.bytes_at(locator_at, LOCATOR_BYTES, "its zip's end")?;
    if !locator.starts_with(LOCATOR) {
        return Err(broken("lacks a record"));
    }
    let end = file.bytes_at(u64_at(&locator, 8), 56, "its zip's end")?;
    if !end.starts_with(END64) {
        return Err(broken("lacks a record"));
    }
    Ok((u64_at(&end, 48), u64_at(&end, 40)))
}

/// The numbers of the extra field 1, which stand for those that 32 bits can't hold.
fn long_fields(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut fields: &[u8] = &[];
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), u16_at(extra, 2));
        let Some(body) = extra.get(4..4 + len) else { break };
        if id == 1 {
            fields = body;
        }
        extra = &extra[4 + len..];
    }
    fields.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b))
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
