//! From a prompt to the windows of token ids that a text encoder reads: CLIP's byte-level BPE (Radford et al. 2021), as
//! transformers' `CLIPTokenizer`.
#![forbid(unsafe_code)]

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::card::ClipConfig;
use crate::error::{Error, Result};

/// What CLIP takes for a word.
const WORD: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Begin and end of a text, which are one token each where they stand in a prompt.
const SPECIAL: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// CLIP's tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer(tokenizers::Tokenizer);

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
        let vocab = serde_json::from_slice::<std::collections::HashMap<String, u32>>(vocab)
            .map_err(|e| Error::Tokenizer(format!("vocab.json: {e}")))?;
        let merges = parse_merges(merges)?;
        if let Some(missing) = SPECIAL.iter().find(|token| !vocab.contains_key(**token)) {
            return Err(Error::Tokenizer(format!("vocab.json has no {missing}")));
        }
        let wrong = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        let model = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
            .end_of_word_suffix("</w>".into())
            .unk_token(SPECIAL[1].into())
            .build()
            .map_err(wrong)?;
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(wrong)?;
        tokenizer.with_normalizer(Some(Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])));
        let words = SplitPattern::Regex(WORD.into());
        let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(wrong)?;
        let bytes = ByteLevel::default().add_prefix_space(false);
        tokenizer.with_pre_tokenizer(Some(PreSequence::new(vec![words.into(), bytes.into()])));
        tokenizer.add_special_tokens(&SPECIAL.map(|token| AddedToken::from(token, true)));
        Ok(Tokenizer(tokenizer))
    }

    /// The ids of `text` alone.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.0.encode_fast(text, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
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

/// Pairs of tokens, most frequent first.
fn parse_merges(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::Tokenizer(format!("merges.txt: {e}")))?;
    let lines =
        text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
    let pair = |(i, line): (usize, &str)| match line.split_once(' ') {
        Some((a, b)) => Ok((a.to_string(), b.to_string())),
        None => Err(Error::Tokenizer(format!("merges.txt: line {} is no pair", i + 1))),
    };
    lines.map(pair).collect()
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
        let cases: [(&[u8], &[u8]); 6] = [
            (b"", b""),
            (b"{}", b""),
            (b"{\"a\": -1}", b""),
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
