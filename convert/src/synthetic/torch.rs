//! Writing PyTorch's checkpoints: `torch.save` of an ordered dictionary of tensors, as a zip and as the older stream.
#![forbid(unsafe_code)]

use std::path::Path;

use super::{Entry, Number, Out, Values};
use crate::error::Error;

/// Pickles, protocol 2.
struct Pickle(Vec<u8>);

impl Pickle {
    fn new() -> Pickle {
        Pickle(vec![0x80, 2])
    }

    fn op(&mut self, op: u8) -> &mut Self {
        self.0.push(op);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.0.push(b'X');
        self.0.extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    fn int(&mut self, value: usize) -> &mut Self {
        match (u8::try_from(value), i32::try_from(value)) {
            (Ok(byte), _) => self.0.extend_from_slice(&[b'K', byte]),
            (_, Ok(int)) => {
                self.0.push(b'J');
                self.0.extend_from_slice(&int.to_le_bytes());
            }
            // Ten bytes at most hold a two's complement number of 64 bits.
            _ => {
                self.0.extend_from_slice(&[0x8A, 9]);
                self.0.extend_from_slice(&(value as u64).to_le_bytes());
                self.0.push(0);
            }
        }
        self
    }

    fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.0.extend_from_slice(format!("c{module}\n{name}\n").as_bytes());
        self
    }

    fn ints(&mut self, values: &[usize]) -> &mut Self {
        self.op(b'(');
        values.iter().for_each(|&v| {
            self.int(v);
        });
        self.op(b't')
    }

    fn ordered_dict(&mut self) -> &mut Self {
        self.global("collections", "OrderedDict").op(b')').op(b'R')
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`; types younger than torch's storages are named
    /// behind that, in `_rebuild_tensor_v3`.
    fn tensor(&mut self, key: &str, entry: &Entry, legacy: bool) -> &mut Self {
        let (version, module, storage) = match entry.number {
            Number::F32 => ("v2", "torch", "FloatStorage"),
            Number::F16 => ("v2", "torch", "HalfStorage"),
            Number::Bf16 => ("v2", "torch", "BFloat16Storage"),
            Number::F8E4M3 | Number::F8E5M2 => ("v3", "torch.storage", "UntypedStorage"),
        };
        let strides: Vec<usize> =
            (0..entry.shape.len()).map(|i| entry.shape[i + 1..].iter().product()).collect();
        self.global("torch._utils", &format!("_rebuild_tensor_{version}")).op(b'(');
        self.op(b'(').text("storage").global(module, storage).text(key).text("cpu").int(entry.count());
        if legacy {
            self.op(b'N'); // no view of another storage
        }
        self.op(b't').op(b'Q'); // the storage, by its persistent name
        self.int(0).ints(&entry.shape).ints(&strides).op(0x89).ordered_dict();
        match entry.number {
            Number::F8E4M3 => self.global("torch", "float8_e4m3fn"),
            Number::F8E5M2 => self.global("torch", "float8_e5m2"),
            Number::F32 | Number::F16 | Number::Bf16 => self,
        };
        self.op(b't').op(b'R')
    }

    /// `{"state_dict": {name: tensor, ...}, "global_step": 470000}`.
    fn checkpoint(entries: &[Entry], legacy: bool) -> Vec<u8> {
        let mut pickle = Pickle::new();
        pickle.op(b'}').op(b'(').text("state_dict").ordered_dict().op(b'(');
        for (i, entry) in entries.iter().enumerate() {
            pickle.text(&entry.name);
            // What is stored under a name is found again: PUT, POP, GET.
            pickle.tensor(&i.to_string(), entry, legacy);
            if i == 0 {
                pickle.op(b'q').op(7).op(b'0').op(b'h').op(7);
            }
        }
        pickle.op(b'u').text("global_step").int(470_000).op(b'u').op(b'.');
        pickle.0
    }
}

/// A zip of stored files: `archive/data.pkl`, `archive/data/0`, ...
pub(super) fn write_zip(path: &Path, entries: &[Entry], values: &Values<'_>) -> Result<(), Error> {
    let mut out = Out::create(path)?;
    let mut directory = Vec::new();
    file(&mut out, &mut directory, "archive/data.pkl", &Pickle::checkpoint(entries, false))?;
    for (i, entry) in entries.iter().enumerate() {
        let bytes = entry.bytes(values);
        file(&mut out, &mut directory, &format!("archive/data/{i}"), &bytes)?;
    }
    file(&mut out, &mut directory, "archive/version", b"3\n")?;
    let (start, count) = (out.at, entries.len() as u64 + 2);
    out.put(&directory)?;
    // The 64-bit end of the directory, its locator, and the 32-bit end that points to nothing.
    let end = out.at;
    out.put(b"PK\x06\x06")?;
    out.put(&44u64.to_le_bytes())?;
    out.put(&[45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    for value in [count, count, directory.len() as u64, start] {
        out.put(&value.to_le_bytes())?;
    }
    out.put(b"PK\x06\x07\0\0\0\0")?;
    out.put(&end.to_le_bytes())?;
    out.put(&1u32.to_le_bytes())?;
    out.put(b"PK\x05\x06\0\0\0\0\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\0\0")?;
    out.finish()
}

fn file(out: &mut Out<'_>, directory: &mut Vec<u8>, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let offset = out.at;
    let mut common = Vec::new();
    common.extend_from_slice(&[45, 0, 0, 8, 0, 0, 0, 0, 0, 0]); // version, UTF-8 names, stored, no date
    common.extend_from_slice(&crc32(bytes).to_le_bytes());
    let (len, long) = match u32::try_from(bytes.len()) {
        Ok(len) if len < u32::MAX => (len, false),
        _ => (u32::MAX, true),
    };
    common.extend_from_slice(&len.to_le_bytes());
    common.extend_from_slice(&len.to_le_bytes());
    common.extend_from_slice(&(name.len() as u16).to_le_bytes());
    let mut extra = Vec::new();
    if long {
        extra.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        extra.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    }
    // Contents begin at a multiple of 64, as in torch's files; the gap is an extra field.
    let local = if long { 20 } else { 0 };
    let begin = offset + 30 + name.len() as u64 + local + 4;
    let gap = begin.next_multiple_of(64) - begin;
    out.put(b"PK\x03\x04")?;
    out.put(&common)?;
    out.put(&((local + 4 + gap) as u16).to_le_bytes())?;
    out.put(name.as_bytes())?;
    if long {
        out.put(&[1, 0, 16, 0])?;
        out.put(&extra)?;
    }
    out.put(b"FB")?;
    out.put(&(gap as u16).to_le_bytes())?;
    out.put(&vec![b'Z'; gap as usize])?;
    out.put(bytes)?;

    extra.extend_from_slice(&offset.to_le_bytes());
    directory.extend_from_slice(b"PK\x01\x02\x2D\0");
    directory.extend_from_slice(&common);
    directory.extend_from_slice(&(extra.len() as u16 + 4).to_le_bytes());
    directory.extend_from_slice(&[0; 10]); // comment, disk, attributes
    directory.extend_from_slice(&u32::MAX.to_le_bytes());
    directory.extend_from_slice(name.as_bytes());
    directory.extend_from_slice(&[1, 0]);
    directory.extend_from_slice(&(extra.len() as u16).to_le_bytes());
    directory.extend_from_slice(&extra);
    Ok(())
}

/// CRC-32 as in zip and PNG.
fn crc32(bytes: &[u8]) -> u32 {
    let table: [u32; 256] = std::array::from_fn(|i| {
        (0..8).fold(i as u32, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    });
    !bytes.iter().fold(!0, |crc, &b| table[usize::from(crc as u8 ^ b)] ^ crc >> 8)
}

/// The stream of torch before 1.6: magic number, protocol, system, the checkpoint, the storages' keys, the storages.
pub(super) fn write_legacy(path: &Path, entries: &[Entry], values: &Values<'_>) -> Result<(), Error> {
    let mut out = Out::create(path)?;
    out.put(b"\x80\x02\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19.")?;
    out.put(b"\x80\x02M\xE9\x03.")?;
    let mut system = Pickle::new();
    system
        .op(b'}')
        .op(b'(')
        .text("protocol_version")
        .int(1001)
        .text("little_endian")
        .op(0x88)
        .op(b'u')
        .op(b'.');
    out.put(&system.0)?;
    out.put(&Pickle::checkpoint(entries, true))?;
    let mut keys = Pickle::new();
    keys.op(b']').op(b'(');
    (0..entries.len()).for_each(|i| {
        keys.text(&i.to_string());
    });
    keys.op(b'e').op(b'.');
    out.put(&keys.0)?;
    for entry in entries {
        out.put(&(entry.count() as u64).to_le_bytes())?;
        out.put(&entry.bytes(values))?;
    }
    out.finish()
}
