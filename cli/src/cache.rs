//! Where files lie that can be made again.

use std::path::PathBuf;

/// Names the folder; empty, nothing is kept between runs but made-up models.
const VARIABLE: &str = "SDFAST_CACHE";

/// The folder of everything that is kept: `$SDFAST_CACHE`, or `sdfast` in the user's cache folder.
pub(crate) fn root() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder(VARIABLE).unwrap_or_else(|| {
        folder("XDG_CACHE_HOME")
            .or_else(|| folder("LOCALAPPDATA"))
            .or_else(|| Some(folder("HOME")?.join(".cache")))
            .unwrap_or_else(std::env::temp_dir)
            .join("sdfast")
    })
}

/// The folder of one kind of file that a run may keep, unless it is to keep nothing.
pub(crate) fn folder(kind: &str) -> Option<PathBuf> {
    let off = std::env::var_os(VARIABLE).is_some_and(|value| value.is_empty());
    (!off).then(|| root().join(kind))
}
