//! Why a command ends without a result: one sentence, a hint, an exit code.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use crate::terminal;

/// Exit code for a request that can't be met.
const REQUEST: u8 = 1;
/// Exit code for a fault of the program.
pub(crate) const FAULT: u8 = 2;

/// A command's result.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// A request that can't be met.
#[derive(Debug)]
pub struct Failure {
    sentence: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    pub(crate) fn new(sentence: impl Into<String>) -> Self {
        Failure { sentence: sentence.into(), hint: None, code: REQUEST }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Failure { hint: Some(hint.into()), ..self }
    }

    /// The system refused to `action` the file.
    pub(crate) fn io(action: &str, path: &Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        let reason = match error.kind() {
            ErrorKind::NotFound => "there is no such file or folder".into(),
            ErrorKind::PermissionDenied => "it isn't allowed".into(),
            ErrorKind::StorageFull => "the disk is full".into(),
            _ => error.to_string(),
        };
        let failure = Failure::new(format!("can't {action} {}: {reason}", path.display()));
        match error.kind() {
            ErrorKind::NotFound => failure.hint("check the path"),
            ErrorKind::PermissionDenied => failure.hint("check the permissions of the file and its folder"),
            ErrorKind::StorageFull => failure.hint("free some space, or write to another disk with -o"),
            _ => failure,
        }
    }

    /// Says it on stderr.
    pub(crate) fn report(&self) -> ExitCode {
        if !self.sentence.is_empty() {
            let mut text = format!("error: {}", self.sentence);
            if let Some(hint) = &self.hint {
                let _ = write!(text, "\nhint: {hint}");
            }
            terminal::note(&text);
        }
        ExitCode::from(self.code)
    }
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Self {
        Failure { hint: error.hint(), ..Failure::new(error.to_string()) }
    }
}

impl From<engine::format::Error> for Failure {
    fn from(error: engine::format::Error) -> Self {
        Failure { hint: error.hint().map(Into::into), ..Failure::new(error.to_string()) }
    }
}

impl From<convert::Error> for Failure {
    fn from(error: convert::Error) -> Self {
        Failure { hint: error.hint(), ..Failure::new(error.to_string()) }
    }
}

/// Arguments that clap refuses, or help and version, which aren't failures.
pub(crate) fn from_clap(error: clap::Error) -> Failure {
    let text = error.render().to_string();
    if !error.use_stderr() {
        terminal::print(text.trim_end());
        return Failure { code: 0, ..Failure::new("") };
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        terminal::note(text.trim_end());
        return Failure::new("");
    }
    // The message's paragraphs: what is wrong, tips, usage.
    let mut paragraphs = text.split("\n\n").map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    let sentence = paragraphs.next().unwrap_or_default();
    let sentence = sentence.strip_prefix("error: ").unwrap_or(&sentence).to_string();
    let tip = paragraphs.find_map(|p| p.strip_prefix("tip: ").map(str::to_string));
    Failure::new(sentence).hint(tip.unwrap_or_else(|| "--help lists what there is".into()))
}

/// A fault of the program is one sentence, too.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
        let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let text = text.replace('\n', " ");
        terminal::note(&format!(
            "error: the program is at fault: {text}{place}\nhint: please report this with the command that led here"
        ));
    }));
}
