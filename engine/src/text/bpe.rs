//! Byte-pair encoding (Sennrich et al. 2016): a word's characters are joined, the most frequent pair first, until no pair
//! of the list is left.
//!
//! The vocabulary is one string with a table of places over it and the merges are one sorted list: about 2 MB, ready in a
//! few milliseconds.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use serde::de::{Deserializer as _, MapAccess, Visitor};

/// What CLIP marks the last character of a word with.
const END_OF_WORD: &str = "</w>";

/// Tokens and merges.
#[derive(Clone, Debug)]
pub(super) struct Bpe {
    vocab: Vocab,
    /// Sorted by `pair`.
    merges: Vec<Merge>,
    unknown: u32,
}

/// Two tokens that become one.
#[derive(Clone, Copy, Debug)]
struct Merge {
    /// The left token, then the right one.
    pair: (u32, u32),
    /// Place in the list: lower ones come first.
    rank: u32,
    /// What they become.
    token: u32,
}

impl Bpe {
    /// From `vocab.json` and `merges.txt`; characters that are no token become `unknown`.
    pub(super) fn new(vocab: &[u8], merges: &[u8], unknown: &str) -> Result<Self, String> {
        let vocab = Vocab::parse(vocab)?;
        let unknown = vocab.id(unknown).ok_or_else(|| format!("vocab.json has no {unknown}"))?;
        let text = std::str::from_utf8(merges).map_err(|e| format!("merges.txt: {e}"))?;
        let lines =
            text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
        let mut list = Vec::new();
        let mut joined = String::new();
        for (i, line) in lines {
            let wrong = |what: &str| format!("merges.txt: line {} {what}", i + 1);
            let (left, right) = line.split_once(' ').ok_or_else(|| wrong("is no pair"))?;
            joined.clear();
            joined.extend([left, right]);
            let [left, right, token] = [left, right, &joined].map(|token| vocab.id(token));
            let (Some(left), Some(right), Some(token)) = (left, right, token) else {
                return Err(wrong("has a token that vocab.json lacks"));
            };
            list.push(Merge { pair: (left, right), rank: list.len() as u32, token });
        }
        // Of a pair that is there twice, the last counts.
        list.sort_unstable_by_key(|m| (m.pair, Reverse(m.rank)));
        list.dedup_by_key(|m| m.pair);
        Ok(Bpe { vocab, merges: list, unknown })
    }

    /// The id of a token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.vocab.id(token)
    }

    fn merge(&self, left: u32, right: u32) -> Option<&Merge> {
        let at = self.merges.binary_search_by_key(&(left, right), |m| m.pair).ok()?;
        Some(&self.merges[at])
    }

    /// Appends the ids of `word`.
    pub(super) fn encode(&self, word: &str, ids: &mut Vec<u32>) {
        let mut symbols = self.characters(word);
        let mut queue = BinaryHeap::new();
        let propose = |queue: &mut BinaryHeap<_>, symbols: &[Symbol], left: usize| {
            let Some(right) = symbols[left].next else { return };
            if let Some(merge) = self.merge(symbols[left].id, symbols[right].id) {
                queue.push(Reverse((merge.rank, left, merge.token)));
            }
        };
        (0..symbols.len()).for_each(|i| propose(&mut queue, &symbols, i));
        while let Some(Reverse((_, left, token))) = queue.pop() {
            // Either side may have become part of another token since.
            let Some(right) = symbols[left].next.filter(|_| symbols[left].is_there) else { continue };
            if self.merge(symbols[left].id, symbols[right].id).is_none_or(|merge| merge.token != token) {
                continue;
            }
            symbols[left].id = token;
            symbols[left].next = symbols[right].next;
            symbols[right].is_there = false;
            if let Some(next) = symbols[left].next {
                symbols[next].previous = Some(left);
            }
            if let Some(previous) = symbols[left].previous {
                propose(&mut queue, &symbols, previous);
            }
            propose(&mut queue, &symbols, left);
        }
        ids.extend(symbols.iter().filter(|s| s.is_there).map(|s| s.id));
    }

    fn characters(&self, word: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(word.len());
        let mut buffer = String::new();
        for (at, character) in word.char_indices() {
            buffer.clear();
            buffer.push(character);
            let is_last = at + character.len_utf8() == word.len();
            if is_last {
                buffer.push_str(END_OF_WORD);
            }
            let i = symbols.len();
            symbols.push(Symbol {
                id: self.id(&buffer).unwrap_or(self.unknown),
                previous: i.checked_sub(1),
                next: (!is_last).then_some(i + 1),
                is_there: true,
            });
        }
        symbols
    }
}

/// A token of a word in the making, in a list with its neighbors.
struct Symbol {
    id: u32,
    previous: Option<usize>,
    next: Option<usize>,
    is_there: bool,
}

/// Tokens and their ids.
#[derive(Clone, Debug, Default)]
struct Vocab {
    /// All tokens, one after another.
    text: String,
    tokens: Vec<Token>,
    /// Open addressing: a place in `tokens` plus one, or zero; a power of two, at most half full.
    slots: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    start: u32,
    len: u32,
    id: u32,
}

impl Vocab {
    fn parse(json: &[u8]) -> Result<Vocab, String> {
        let mut vocab = Vocab::default();
        let mut json = serde_json::Deserializer::from_slice(json);
        let parsed = json.deserialize_map(TokenVisitor(&mut vocab)).and_then(|()| json.end());
        parsed.map_err(|e| format!("vocab.json: {e}"))?;
        vocab.slots = vec![0; (2 * vocab.tokens.len()).next_power_of_two()];
        for i in 0..vocab.tokens.len() {
            let slot = vocab.slot(vocab.token(i));
            vocab.slots[slot] = i as u32 + 1;
        }
        Ok(vocab)
    }

    fn token(&self, i: usize) -> &str {
        let Token { start, len, .. } = self.tokens[i];
        &self.text[start as usize..(start + len) as usize]
    }

    /// Where `token` is, or would be.
    fn slot(&self, token: &str) -> usize {
        let hash = token.bytes().fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
        });
        let mask = self.slots.len() - 1;
        let mut slot = (hash ^ (hash >> 32)) as usize & mask;
        while self.slots[slot] != 0 && self.token(self.slots[slot] as usize - 1) != token {
            slot = (slot + 1) & mask;
        }
        slot
    }

    fn id(&self, token: &str) -> Option<u32> {
        let i = self.slots[self.slot(token)].checked_sub(1)?;
        Some(self.tokens[i as usize].id)
    }
}

/// Puts the pairs of a JSON object into the vocabulary.
struct TokenVisitor<'v>(&'v mut Vocab);

impl<'de> Visitor<'de> for TokenVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tokens and ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        /// A string that is borrowed where it has no escapes.
        #[derive(serde::Deserialize)]
        struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

        while let Some((Key(token), id)) = map.next_entry()? {
            let (start, len) = (self.0.text.len(), token.len());
            let [start, len] = [start, len].map(|n| u32::try_from(n).map_err(serde::de::Error::custom));
            self.0.tokens.push(Token { start: start?, len: len?, id });
            self.0.text.push_str(&token);
        }
        Ok(())
    }
}
