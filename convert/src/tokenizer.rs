//! CLIP's vocabulary comes with the program; a checkpoint's own one wins.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::HashMap;

use crate::source::TokenizerFiles;

static VOCAB: &[u8] = include_bytes!("../../models/demo/model/tokenizer/vocab.json");
static MERGES: &[u8] = include_bytes!("../../models/demo/model/tokenizer/merges.txt");

/// A tokenizer's files as they go into the model.
pub(crate) struct Files<'a> {
    pub(crate) vocab: Cow<'a, [u8]>,
    pub(crate) merges: Cow<'a, [u8]>,
}

/// The checkpoint's own tokenizer unless it is CLIP's in another spelling, so that one model gives the same bytes from
/// every layout.
pub(crate) fn choose(own: Option<&TokenizerFiles>) -> Files<'_> {
    match own {
        Some(own) if !is_clip(own) => {
            Files { vocab: Cow::Borrowed(&own.vocab), merges: Cow::Borrowed(&own.merges) }
        }
        _ => Files { vocab: Cow::Borrowed(VOCAB), merges: Cow::Borrowed(MERGES) },
    }
}

fn is_clip(own: &TokenizerFiles) -> bool {
    fn vocab(bytes: &[u8]) -> Option<HashMap<String, u64>> {
        serde_json::from_slice(bytes).ok()
    }
    fn merges(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
        let lines = bytes.split(|&b| b == b'\n').map(|line| line.trim_ascii_end());
        lines.filter(|line| !line.is_empty() && !line.starts_with(b"#version"))
    }
    if own.vocab == VOCAB && own.merges == MERGES {
        return true;
    }
    let same = vocab(&own.vocab);
    same.is_some() && same == vocab(VOCAB) && merges(&own.merges).eq(merges(MERGES))
}
