//! Runs the real programs.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a program left behind.
pub(crate) struct Ran {
    /// Exit code; `None` where a signal ended it.
    pub(crate) code: Option<i32>,
    /// Results.
    pub(crate) stdout: String,
    /// Everything else.
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        let text = |bytes| String::from_utf8(bytes).expect("programs print UTF-8");
        Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Ran {
    /// Asserts exit code 0.
    #[track_caller]
    pub(crate) fn done(self) -> Ran {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// Asserts exit code 1, one sentence that contains `words`, at most a hint behind it, and nothing on stdout.
    #[track_caller]
    pub(crate) fn refused(self, words: &str) -> Ran {
        assert_eq!(self.code, Some(1), "{}", self.stderr);
        assert_eq!(self.stdout, "");
        let lines: Vec<&str> = self.stderr.lines().filter(|line| !line.starts_with("warning: ")).collect();
        assert!(lines[0].starts_with("error: ") && lines[0].contains(words), "{words:?} in {}", self.stderr);
        assert!(lines.len() <= 2 && lines[1..].iter().all(|l| l.starts_with("hint: ")), "{}", self.stderr);
        self
    }
}

/// `sdfast ...` in `folder`.
pub(crate) fn sdfast(folder: &Path, arguments: &[&str]) -> Ran {
    command(env!("CARGO_BIN_EXE_sdfast"), folder).args(arguments).output().expect("it starts").into()
}

/// `sdconv ...` in `folder`.
pub(crate) fn sdconv(folder: &Path, arguments: &[&str]) -> Ran {
    command(env!("CARGO_BIN_EXE_sdconv"), folder).args(arguments).output().expect("it starts").into()
}

/// A program in `folder`, with no settings from outside.
pub(crate) fn command(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).env_remove("SDFAST_ISA").env("SDFAST_CACHE", "");
    command
}

/// A folder that goes away.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// The demo model's checkpoint.
pub(crate) fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

/// Names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
