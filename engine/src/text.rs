//! From a prompt to the windows of token ids that a text encoder reads: CLIP's byte-level BPE (Radford et al. 2021), as
//! transformers' `CLIPTokenizer`.
#![forbid(unsafe_code)]

mod bpe;

use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    SplitDelimiterBehavior,
};

use crate::card::ClipConfig;
use crate::error::{Error, Result};
use bpe::Bpe;

/// What CLIP takes for a word.
const WORD: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Begin and end of a text, which are one token each where they stand in a prompt.
const SPECIAL: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// CLIP's tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    normalizer: Sequence,
    /// Text to words, and the words' bytes to the characters that stand for them.
    words: PreSequence,
    bpe: Bpe,
    special: [u32; 2],
}

/// A window of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// `[max_position_embeddings]`: begin, text, end, padding.
    pub ids: Vec<u32>,
    /// Index of the first end token.
    pub end: usize,
    /// Tokens of the text that the window has no room for.
    pub dropped: usize,
}

impl Tokenizer {
    /// From the bytes of `vocab.json` (`{"token": id}`) and `merges.txt` (a pair a line, the first line a comment).
    pub fn new(vocab: &[u8], merges: &[u8]) -> Result<Self> {
        let bpe = Bpe::new(vocab, merges, SPECIAL[1]).map_err(Error::Tokenizer)?;
        let id = |token| bpe.id(token).ok_or_else(|| Error::Tokenizer(format!("vocab.json has no {token}")));
        let special = [id(SPECIAL[0])?, id(SPECIAL[1])?];
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(wrong)?;
        let normalizer = Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()]);
        let words = SplitPattern::Regex(WORD.into());
        let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(wrong)?;
        let bytes = ByteLevel::default().add_prefix_space(false);
        let words = PreSequence::new(vec![words.into(), bytes.into()]);
        Ok(Tokenizer { normalizer, words, bpe, special })
    }

    /// The ids of `text` alone.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut rest = text;
        loop {
            let found =
                SPECIAL.iter().zip(self.special).filter_map(|(s, id)| Some((rest.find(s)?, s.len(), id)));
            let Some((at, len, id)) = found.min() else { break };
            self.add(&rest[..at], &mut ids)?;
            ids.push(id);
            rest = &rest[at + len..];
        }
        self.add(rest, &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of a text without special tokens.
    fn add(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut text = NormalizedString::from(text);
        self.normalizer.normalize(&mut text).map_err(wrong)?;
        let mut text = PreTokenizedString::from(text);
        self.words.pre_tokenize(&mut text).map_err(wrong)?;
        for (word, ..) in text.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            self.bpe.encode(word, ids);
        }
        Ok(())
    }

    /// The one window of `text` for the text encoder `config`; what doesn't fit is dropped.
    pub fn window(&self, text: &str, config: &ClipConfig) -> Result<Window> {
        let text = self.ids(text)?;
        let len = config.max_position_embeddings;
        let kept = text.len().min(len.saturating_sub(2));
        let mut ids = Vec::with_capacity(len);
        ids.push(config.bos_token_id);
        ids.extend_from_slice(&text[..kept]);
        ids.push(config.eos_token_id);
        ids.resize(len, config.pad_token_id);
        let end = ids.iter().position(|&id| id == config.eos_token_id).unwrap_or(kept + 1);
        Ok(Window { ids, end, dropped: text.len() - kept })
    }
}

fn wrong(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::card::ClipActivation;

    /// See `tests/data/make_golden.py`.
    #[derive(Deserialize)]
    struct Golden {
        text: String,
        repeat: usize,
        ids: Vec<u32>,
    }

    fn demo() -> Tokenizer {
        let vocab = include_bytes!("../../models/demo/model/tokenizer/vocab.json");
        let merges = include_bytes!("../../models/demo/model/tokenizer/merges.txt");
        Tokenizer::new(vocab, merges).expect("CLIP's vocabulary")
    }

    fn clip() -> ClipConfig {
        ClipConfig {
            vocab_size: 49408,
            hidden_size: 64,
            intermediate_size: 256,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            max_position_embeddings: 77,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            bos_token_id: 49406,
            eos_token_id: 49407,
            pad_token_id: 0,
            output_layer: 1,
            output_norm: true,
            projection_dim: None,
        }
    }

    #[test]
    fn ids_are_those_of_transformers() {
        let tokenizer = demo();
        let golden: Vec<Golden> =
            serde_json::from_str(include_str!("../../tests/data/tokens.json")).expect("golden file");
        for Golden { text, repeat, ids } in golden {
            let found = tokenizer.ids(&text.repeat(repeat)).expect("any text has tokens");
            assert_eq!(found, ids, "{text:?}");
        }
    }

    #[test]
    fn a_window_is_begun_ended_and_filled() {
        let window = demo().window("a cat", &clip()).expect("fits");
        assert_eq!(window.ids[..4], [49406, 320, 2368, 49407]);
        assert!(window.ids[4..].iter().all(|&id| id == 0));
        assert_eq!((window.ids.len(), window.end, window.dropped), (77, 3, 0));
        let empty = demo().window("", &clip()).expect("fits");
        assert_eq!((&empty.ids[..3], empty.end), (&[49406, 49407, 0][..], 1));
    }

    #[test]
    fn ten_thousand_words_are_cut_off_quickly() {
        let tokenizer = demo();
        let start = std::time::Instant::now();
        let window = tokenizer.window(&"a red circle on blue ".repeat(2000), &clip()).expect("is cut off");
        let long = tokenizer.window(&"x".repeat(100_000), &clip()).expect("is cut off");
        assert!(start.elapsed().as_secs_f64() < 2.0, "{:?}", start.elapsed());
        assert_eq!((window.ids.len(), window.end, window.dropped), (77, 76, 10_000 - 75));
        assert_eq!(long.end, 76);
    }

    #[test]
    fn broken_vocabularies_are_errors() {
        let good = br#"{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "ab": 4}"#;
        let cases: [(&[u8], &[u8]); 9] = [
            (b"", b""),
            (b"{}", b""),
            (b"{\"a\": -1}", b""),
            (br#"{"<|startoftext|>": 0}"#, b""),
            (br#"{"<|endoftext|>": 0}"#, b""),
            (br#"{"<|startoftext|>": 0, "<|endoftext|>": 1} x"#, b""),
            (good, b"ab"),
            (good, b"a c"),
            (good, b"\xff\xfe a"),
        ];
        for (vocab, merges) in cases {
            assert!(Tokenizer::new(vocab, merges).is_err(), "{:?}", (vocab, merges));
        }
        assert!(Tokenizer::new(good, b"#version: 0.2\na b\n").is_ok());
    }
}
