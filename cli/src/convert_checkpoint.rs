//! `sdconv CHECKPOINT`

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use convert::{Options, Subject, Summary, Total};

use crate::args::Convert;
use crate::failure::{Failure, Result};
use crate::progress::{Level, Progress};
use crate::{interrupt, size, terminal};

/// A pipe gets a line for each of so many equal parts.
const LINES: u64 = 10;

pub(crate) fn run(arguments: Convert) -> Result<()> {
    let level = Level::from(arguments.voice);
    let Some(checkpoint) = arguments.checkpoint else {
        return Err(Failure::new("no checkpoint is given").hint("name a file or a folder; --help shows more"));
    };
    let options = Options {
        checkpoint,
        output: arguments.output,
        quant: arguments.quant.into(),
        keep: arguments.keep,
        vae: arguments.vae,
        family: arguments.family.map(Into::into),
        prediction: arguments.prediction.map(Into::into),
        config: arguments.config,
        calibrate: arguments.calibrate,
        report: arguments.report,
        threads: arguments.threads.map(usize::from),
        force: arguments.force,
        stop: Some(interrupt::flag()),
    };
    let start = Instant::now();
    let progress = Progress::new(level, options.quant.name());
    let lines = AtomicU64::new(0);
    let outcome = convert::convert(&options, &|now| {
        let line = LINES * now.done / now.total.max(1);
        let text = format!("{} of {}", size::bytes(now.done), size::bytes(now.total));
        if lines.fetch_max(line, Ordering::Relaxed) < line {
            progress.at(now.done, now.total, &text);
        } else {
            progress.move_to(now.done, now.total);
        }
    });
    drop(progress);
    let summary = outcome?;
    for note in &summary.notes {
        level.say(&format!("note: {note}"));
    }
    level.detail(&table("parts", &summary.parts));
    level.detail(&table("encodings", &summary.encodings));
    terminal::print(&summary.output.display().to_string());
    level.say(&closing_line(&summary, start.elapsed().as_secs_f64()));
    Ok(())
}

fn table(title: &str, totals: &[Total]) -> String {
    let row = |t: &Total| {
        format!(
            "\n  {:<16}{:>5} tensors {:>9.1} M numbers {:>10}",
            t.name,
            t.tensors,
            t.parameters as f64 / 1e6,
            size::bytes(t.bytes)
        )
    };
    title.to_string() + &totals.iter().map(row).collect::<String>()
}

fn closing_line(summary: &Summary, seconds: f64) -> String {
    let bits = match summary.card {
        Subject::Model(_) => format!(", {:.2} bits per weight in the denoiser", summary.unet_bits_per_weight),
        Subject::Vae(_) => String::new(),
    };
    format!(
        "{} to {}{bits}, {seconds:.1} s, {}/s",
        size::bytes(summary.source_bytes),
        size::bytes(summary.file_bytes),
        size::bytes((summary.source_bytes as f64 / seconds.max(1e-3)) as u64)
    )
}
