//! Progress: a bar for people, lines for pipes, nothing where nothing is wanted.

use std::time::Duration;

use engine::pipeline::{Event, Part};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Voice;
use crate::terminal;

/// Parts of a step that the bar knows.
const FINENESS: u64 = 100;

/// How much is said, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Quiet,
    Normal,
    Verbose,
}

impl From<Voice> for Level {
    fn from(voice: Voice) -> Self {
        match voice {
            Voice { quiet: true, .. } => Level::Quiet,
            Voice { verbose: true, .. } => Level::Verbose,
            _ => Level::Normal,
        }
    }
}

impl Level {
    /// A message for people.
    pub(crate) fn say(self, text: &str) {
        if self != Level::Quiet {
            terminal::note(text);
        }
    }

    /// A message for curious people.
    pub(crate) fn detail(self, text: &str) {
        if self == Level::Verbose {
            terminal::note(text);
        }
    }
}

/// The progress of one piece of work.
#[derive(Debug)]
pub(crate) struct Progress {
    level: Level,
    /// `None` in a pipe, and where nothing is wanted.
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new(level: Level, title: &str) -> Progress {
        let bar = (level != Level::Quiet && terminal::is_watched()).then(|| {
            let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg} {eta:>4}");
            let style = style.expect("the template is well-formed").progress_chars("=> ");
            let bar = ProgressBar::new(1).with_style(style).with_prefix(title.to_string());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Progress { level, bar }
    }

    /// A message that stays above the bar.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.level.say(text)),
            None => self.level.say(text),
        }
    }

    /// `done` of `of`, and what is being done; a pipe gets a line for it.
    pub(crate) fn at(&self, done: u64, of: u64, text: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(of);
                bar.set_position(done);
                bar.set_message(text.to_string());
            }
            None => self.level.say(text),
        }
    }

    /// As [`Progress::at`], but not worth a line.
    pub(crate) fn move_to(&self, done: u64, of: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(of);
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The progress of a picture, told by the pipeline's events.
#[derive(Debug)]
pub(crate) struct PictureProgress {
    progress: Progress,
    steps_done: u64,
    steps: u64,
}

impl PictureProgress {
    pub(crate) fn new(level: Level, title: &str, steps: usize) -> Self {
        PictureProgress { progress: Progress::new(level, title), steps_done: 0, steps: steps as u64 }
    }

    pub(crate) fn on(&mut self, event: &Event) {
        let all = self.steps * FINENESS;
        match *event {
            Event::Warning(ref warning) => self.progress.say(&format!("warning: {warning}")),
            Event::Layer { part: Part::Denoiser, ahead: false, done, of } => {
                let share = FINENESS * done as u64 / of.max(1) as u64;
                self.progress.move_to(self.steps_done * FINENESS + share, all);
            }
            Event::Layer { .. } => {}
            Event::Done(Part::Text) => self.progress.at(0, all, "prompt read"),
            Event::Done(Part::Denoiser) => self.progress.at(all, all, "decoding"),
            Event::Done(Part::Vae) => {}
            Event::Step { done, of, seconds } => {
                (self.steps_done, self.steps) = (done as u64, of as u64);
                let text = format!("step {done}/{of}, {seconds:.2} s");
                self.progress.at(self.steps_done * FINENESS, self.steps * FINENESS, &text);
            }
        }
    }
}
