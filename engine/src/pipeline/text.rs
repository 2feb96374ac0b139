//! Prompts to what conditions the denoiser.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{OnEvent, Pipeline, Request, tell};
use crate::budget::MemoryPlan;
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

    /// The prompts of a request: the negative one first, where there is guidance.
    pub(super) fn prompts(
        &self,
        request: &Request,
        guided: bool,
        event: &mut OnEvent<'_>,
    ) -> Result<Vec<Prompt>> {
        let mut texts = vec![];
        if guided {
            texts.push(("negative prompt", &request.negative_prompt));
        } else if !request.negative_prompt.is_empty() {
            tell(event, Event::Warning(Warning::NegativeWithoutGuidance))?;
        }
        texts.push(("prompt", &request.prompt));
        let mut prompts = vec![];
        for (which, text) in texts {
            let prompt = self.tokenize(text)?;
            let dropped = prompt.windows.iter().map(|w| w.dropped).max().unwrap_or(0);
            if dropped > 0 {
                tell(event, Event::Warning(Warning::PromptTruncated { which, dropped }))?;
            }
            prompts.push(prompt);
        }
        Ok(prompts)
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
