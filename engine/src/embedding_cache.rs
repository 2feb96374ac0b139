//! What the text encoders made of a prompt, kept on disk, so that a repeated prompt loads neither tokenizer nor text encoder.
//!
//! A file for each prompt, named by a hash of everything that the numbers depend on: the weights of the text encoders, the
//! card, the text, the precision and the instruction sets. Files may be deleted at any time; one that doesn't check out
//! counts as absent. The folder is bounded: when it is full, what was used longest ago goes.
#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::format::{ModelFile, xxh64};
use crate::pipeline::{Conditioning, Settings};

const MAGIC: &[u8; 8] = b"sdfemb\x01\n";
/// Files in the folder.
const MAX_FILES: usize = 512;
/// Numbers in an embedding: far above any model's.
const MAX_NUMBERS: usize = 1 << 24;

/// The cache of one model under one set of settings.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    /// Hash of everything but the text.
    model: u64,
}

/// What is kept of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) conditioning: Conditioning,
    /// Tokens that the window had no room for.
    pub(crate) dropped: usize,
}

impl Cache {
    /// The cache in the folder that `settings` name, if they do.
    pub(crate) fn new(file: &ModelFile, settings: &Settings) -> Option<Cache> {
        let folder = settings.cache.clone()?;
        let mut key = format!(
            "{} {} {} {:?}",
            env!("CARGO_PKG_VERSION"),
            settings.precision,
            settings.isa.name(),
            file.card().text_encoders
        );
        for tensor in file.tensors().iter().filter(|t| t.name.starts_with("text_encoder")) {
            key.push_str(&format!(" {:016x}", tensor.checksum));
        }
        key.push_str(&format!(" {:016x} {:016x}", xxh64(file.vocab()), xxh64(file.merges())));
        Some(Cache { folder, model: xxh64(key.as_bytes()) })
    }

    fn path(&self, text: &str) -> PathBuf {
        let name = format!("{:016x}{:016x}.emb", self.model, xxh64(text.as_bytes()));
        self.folder.join(name)
    }

    /// What is kept of `text`.
    pub(crate) fn get(&self, text: &str) -> Option<Entry> {
        let path = self.path(text);
        let entry = decode(&fs::read(&path).ok()?, text)?;
        // Used now: the age that `trim` looks at. Where the file can't be touched it is only forgotten earlier.
        if let Ok(file) = fs::File::options().append(true).open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(entry)
    }

    /// Keeps `entry`. A cache that can't be written is no error.
    pub(crate) fn put(&self, text: &str, entry: &Entry) {
        let _ = self.try_put(text, entry);
    }

    fn try_put(&self, text: &str, entry: &Entry) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let path = self.path(text);
        let part = path.with_extension(format!("{}.part", std::process::id()));
        let written = fs::File::create(&part).and_then(|mut f| f.write_all(&encode(entry, text)));
        match written.and_then(|()| fs::rename(&part, &path)) {
            Ok(()) => trim(&self.folder, MAX_FILES),
            Err(e) => {
                let _ = fs::remove_file(&part);
                Err(e)
            }
        }
    }
}

/// Removes the files used longest ago, down to `most`.
fn trim(folder: &Path, most: usize) -> std::io::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = fs::read_dir(folder)?
        .flatten()
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .filter(|(_, path)| path.extension().is_some_and(|x| x == "emb"))
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(most);
    files[..surplus].iter().try_for_each(|(_, path)| fs::remove_file(path))
}

/// magic, checksum of the rest, text length, text, tokens, dropped, numbers of context and of pooled, then these as f32.
fn encode(entry: &Entry, text: &str) -> Vec<u8> {
    let c = &entry.conditioning;
    let mut body = vec![];
    body.extend((text.len() as u64).to_le_bytes());
    body.extend(text.as_bytes());
    for n in [c.tokens, entry.dropped, c.context.len(), c.pooled.len()] {
        body.extend((n as u64).to_le_bytes());
    }
    c.context.iter().chain(&c.pooled).for_each(|x| body.extend(x.to_le_bytes()));
    [MAGIC.as_slice(), &xxh64(&body).to_le_bytes(), &body].concat()
}

fn decode(bytes: &[u8], text: &str) -> Option<Entry> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (checksum, body) = rest.split_first_chunk::<8>()?;
    if xxh64(body) != u64::from_le_bytes(*checksum) {
        return None;
    }
    let mut body = body;
    let number = |body: &mut &[u8]| -> Option<usize> {
        let (n, rest) = body.split_first_chunk::<8>()?;
        *body = rest;
        usize::try_from(u64::from_le_bytes(*n)).ok()
    };
    let len = number(&mut body)?;
    body = body.strip_prefix(text.as_bytes()).filter(|_| len == text.len())?;
    let [tokens, dropped, context, pooled] = [(); 4].map(|()| number(&mut body));
    let (context, pooled) = (context?, pooled?);
    if context > MAX_NUMBERS || pooled > MAX_NUMBERS || body.len() != 4 * (context + pooled) {
        return None;
    }
    let numbers: Vec<f32> = body.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let (context, pooled) = numbers.split_at(context);
    let conditioning = Conditioning { context: context.to_vec(), tokens: tokens?, pooled: pooled.to_vec() };
    Some(Entry { conditioning, dropped: dropped? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let context = vec![1.0, -2.5, 0.0, 3.25];
        Entry { conditioning: Conditioning { context, tokens: 2, pooled: vec![7.0] }, dropped: 3 }
    }

    #[test]
    fn comes_back_whole_or_not_at_all() {
        let bytes = encode(&entry(), "a cat");
        assert_eq!(decode(&bytes, "a cat"), Some(entry()));
        assert_eq!(decode(&bytes, "a dog"), None);
        for i in 0..bytes.len() {
            assert_eq!(decode(&bytes[..i], "a cat"), None);
            let mut changed = bytes.clone();
            changed[i] ^= 1;
            assert_eq!(decode(&changed, "a cat"), None, "byte {i}");
        }
    }

    #[test]
    fn keeps_the_latest() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { folder: dir.path().join("deep/er"), model: 5 };
        assert_eq!(cache.get("x"), None);
        cache.put("x", &entry());
        assert_eq!(cache.get("x"), Some(entry()));
        for i in 0..5 {
            cache.put(&i.to_string(), &entry());
            let age = SystemTime::now() - std::time::Duration::from_secs(100 - i);
            fs::File::options()
                .append(true)
                .open(cache.path(&i.to_string()))
                .unwrap()
                .set_modified(age)
                .unwrap();
        }
        trim(&cache.folder, 3).unwrap();
        assert!(cache.get("x").is_some() && cache.get("4").is_some() && cache.get("0").is_none());
        assert_eq!(fs::read_dir(&cache.folder).unwrap().count(), 3);
    }
}
