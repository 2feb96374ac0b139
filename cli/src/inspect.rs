//! `sdconv inspect`

use std::fmt::Write as _;

use convert::Inspection;
use engine::card::VaeCard;

use crate::args::Inspect;
use crate::failure::Result;
use crate::report::{to_json, word};
use crate::{size, terminal};

pub(crate) fn run(arguments: &Inspect) -> Result<()> {
    let found = convert::inspect(&arguments.file)?;
    if arguments.json {
        terminal::print(&to_json(&found));
    } else {
        terminal::print(&describe(&found));
    }
    Ok(())
}

fn describe(found: &Inspection) -> String {
    let mut text = format!("layout      {}", found.layout);
    if let Some(card) = &found.card {
        text += "\n";
        text += &describe_card(card);
    }
    if let Some(card) = &found.vae {
        text += "\n";
        text += &describe_vae(card);
    }
    for part in &found.parts {
        let types: Vec<String> =
            part.types.iter().map(|(name, n)| format!("{name} {}", size::bytes(*n))).collect();
        let _ = write!(
            text,
            "\npart        {:<16}{:>5} tensors {:>9.1} M numbers  {}",
            part.name,
            part.tensors,
            part.parameters as f64 / 1e6,
            types.join(", ")
        );
    }
    for note in &found.notes {
        let _ = write!(text, "\nnote        {note}");
    }
    if let Some(fault) = &found.fault {
        let _ = write!(text, "\nfault       {fault}");
    }
    text
}

/// The card of a VAE alone, for people.
fn describe_vae(card: &VaeCard) -> String {
    let (channels, factor) = (card.vae.latent_channels, card.vae.factor());
    let encoder = if card.vae.has_encoder() { "" } else { ", decoder alone" };
    let mut text = format!("tiny VAE    {channels} channels, {factor}x{factor} pixels a latent{encoder}");
    if !card.provenance.quant.is_empty() {
        let _ = write!(text, "\nmade by     {}", card.provenance.converter);
    }
    text
}

/// A model's card, for people.
pub(crate) fn describe_card(card: &engine::card::Card) -> String {
    let d = &card.defaults;
    let s = &card.schedule;
    let levels = match s.edm {
        Some(edm) => format!(", EDM noise levels {} to {}", edm.sigma_min, edm.sigma_max),
        None if s.rescale_betas_zero_snr => ", zero terminal SNR".into(),
        None => String::new(),
    };
    let mut lines = vec![
        format!("family      {}", word(&card.family)),
        format!("prediction  {}{levels}", word(&s.prediction_type)),
        format!(
            "defaults    {}x{}, {} steps of {}, cfg {:?}",
            d.width, d.height, d.steps, d.sampler, d.guidance_scale
        ),
    ];
    if !card.provenance.quant.is_empty() {
        lines.push(format!("quant       {}", card.provenance.quant));
        lines.push(format!("made by     {}", card.provenance.converter));
    }
    lines.join("\n")
}
