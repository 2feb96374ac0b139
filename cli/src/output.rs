//! Files that appear complete or not at all.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use crate::failure::{Failure, Result};

/// A file to be written. Making one shows whether it can be written, before any work is done for it.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
}

impl Output {
    /// A file at `path`; an existing one will be replaced.
    pub(crate) fn new(path: PathBuf) -> Result<Output> {
        if path.is_dir() {
            return Err(
                Failure::new(format!("can't write {}: it is a folder", path.display())).hint("name a file")
            );
        }
        let output = Output { path };
        if !output.is_device() {
            output.temporary()?;
        }
        Ok(output)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts `bytes` there.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<()> {
        let fail = |error: std::io::Error| Failure::io("write", &self.path, &error);
        if self.is_device() {
            return fs::write(&self.path, bytes).map_err(fail);
        }
        let mut file = self.temporary()?;
        file.write_all(bytes).map_err(fail)?;
        file.persist(&self.path).map_err(|e| fail(e.error))?;
        Ok(())
    }

    /// A pipe or a device such as `/dev/null` is written to, not replaced.
    fn is_device(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|m| !m.is_file())
    }

    /// A file beside the target that goes away by itself.
    fn temporary(&self) -> Result<NamedTempFile> {
        let folder = match self.path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let mut builder = Builder::new();
        builder.prefix(".sdfast-").suffix(".part");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        builder.tempfile_in(folder).map_err(|error| Failure::io("write", &self.path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_complete_and_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.bin");
        let output = Output::new(path.clone()).expect("writable");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        output.write(b"one").expect("written");
        output.write(b"two").expect("replaced");
        assert_eq!(fs::read(&path).expect("there"), b"two");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_known_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Output::new(folder.path().to_owned()).is_err());
        assert!(Output::new(folder.path().join("missing/a.png")).is_err());
    }
}
