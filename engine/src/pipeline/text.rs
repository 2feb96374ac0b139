//! Prompts to what conditions the denoiser.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{OnEvent, Pipeline, Request, tell};
use crate::budget::MemoryPlan;
use crate::embedding_cache::{Cache, Entry};
use crate::error::{Error, Result};
use crate::models::Part;
use crate::pipeline::types::{Event, Warning};
use crate::text::{Tokenizer, Window};

/// A text, cut into a window for each text encoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// One for each text encoder.
    pub windows: Vec<Window>,
}

/// What the text encoders make of a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conditioning {
    /// `[tokens, cross_attention_dim]`: the encoders' hidden states side by side.
    pub context: Vec<f32>,
    /// Tokens.
    pub tokens: usize,
    /// `[projection_dim]`, or empty where no encoder has a projection.
    pub pooled: Vec<f32>,
}

impl Pipeline {
    /// The tokenizer, parsed at its first use.
    fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        let mut kept = self.tokenizer.lock().expect("nobody panics while holding it");
        if let Some(t) = &*kept {
            return Ok(t.clone());
        }
        let t = Arc::new(Tokenizer::new(self.file.vocab(), self.file.merges())?);
        *kept = Some(t.clone());
        Ok(t)
    }

    /// Gives the tokenizer's memory back, until it is used again.
    pub(super) fn forget_tokenizer(&self) {
        *self.tokenizer.lock().expect("nobody panics while holding it") = None;
        crate::memory::trim();
    }

    /// Cuts `text` into windows.
    pub fn tokenize(&self, text: &str) -> Result<Prompt> {
        let tokenizer = self.tokenizer()?;
        let windows = self.card().text_encoders.iter().map(|cfg| tokenizer.window(text, cfg));
        Ok(Prompt { text: text.to_owned(), windows: windows.collect::<Result<_>>()? })
    }

    /// What conditions the denoiser for a request: the negative prompt first, where there is guidance. What the cache knows is
    /// not computed again.
    pub(super) fn conditioning(
        &self,
        plan: &MemoryPlan,
        request: &Request,
        guided: bool,
        event: &mut OnEvent<'_>,
    ) -> Result<Vec<Conditioning>> {
        let mut texts = vec![];
        if guided {
            texts.push(("negative prompt", &request.negative_prompt));
        } else if !request.negative_prompt.is_empty() {
            tell(event, Event::Warning(Warning::NegativeWithoutGuidance))?;
        }
        texts.push(("prompt", &request.prompt));
        let cache = Cache::new(&self.file, &self.settings);
        let known: Option<Vec<Entry>> =
            cache.as_ref().and_then(|cache| texts.iter().map(|(_, text)| cache.get(text)).collect());
        let entries = match known {
            Some(entries) => entries,
            None => {
                let prompts: Vec<Prompt> =
                    texts.iter().map(|(_, text)| self.tokenize(text)).collect::<Result<_>>()?;
                if !plan.keeps {
                    self.forget_tokenizer();
                }
                let dropped = |p: &Prompt| p.windows.iter().map(|w| w.dropped).max().unwrap_or(0);
                let conditioning = self.encode(plan, &prompts, event)?;
                let entry = |(conditioning, prompt)| Entry { conditioning, dropped: dropped(prompt) };
                let entries: Vec<Entry> = conditioning.into_iter().zip(&prompts).map(entry).collect();
                if let Some(cache) = &cache {
                    texts.iter().zip(&entries).for_each(|((_, text), entry)| cache.put(text, entry));
                }
                entries
            }
        };
        for ((which, _), entry) in texts.iter().zip(&entries) {
            if entry.dropped > 0 {
                let dropped = entry.dropped;
                tell(event, Event::Warning(Warning::PromptTruncated { which, dropped }))?;
            }
        }
        Ok(entries.into_iter().map(|e| e.conditioning).collect())
    }

    /// What the text encoders make of each prompt; `plan` is for as many prompts.
    pub fn encode(
        &self,
        plan: &MemoryPlan,
        prompts: &[Prompt],
        event: &mut OnEvent<'_>,
    ) -> Result<Vec<Conditioning>> {
        let encoders = &self.card().text_encoders;
        let mut out = vec![Conditioning::default(); prompts.len()];
        let mut parts: Vec<(usize, Vec<f32>)> = vec![]; // width, [batch, tokens, width]
        for (i, cfg) in encoders.iter().enumerate() {
            let tokens = cfg.max_position_embeddings;
            let hidden = self.session(plan, Part::TextEncoder(i), event, |session, watch| {
                for (row, prompt) in session.ids("ids").chunks_exact_mut(tokens).zip(prompts) {
                    let window = &prompt.windows[i];
                    if window.ids.iter().any(|&id| id as usize >= cfg.vocab_size) {
                        return Err(Error::Tokenizer("it has more tokens than the text encoder".into()));
                    }
                    row.copy_from_slice(&window.ids);
                }
                session.prologue(0, watch)?;
                if let Some(dim) = cfg.projection_dim {
                    let pooled = session.output("pooled"); // [batch, tokens, dim]
                    for (b, (c, prompt)) in out.iter_mut().zip(prompts).enumerate() {
                        let row = b * tokens + prompt.windows[i].end;
                        c.pooled = pooled[row * dim..][..dim].to_vec();
                    }
                }
                Ok(session.output("hidden").to_vec())
            })?;
            parts.push((cfg.hidden_size, hidden));
        }
        for (b, c) in out.iter_mut().enumerate() {
            c.tokens = encoders[0].max_position_embeddings;
            for t in 0..c.tokens {
                for (width, hidden) in &parts {
                    c.context.extend_from_slice(&hidden[(b * c.tokens + t) * width..][..*width]);
                }
            }
        }
        Ok(out)
    }
}
