//! `sdconv synthetic`

use convert::synthetic;

use crate::args::Synthetic;
use crate::failure::{Failure, Result};
use crate::{model, terminal};

pub(crate) fn run(arguments: &Synthetic) -> Result<()> {
    let card = model::published(&arguments.name)?;
    let path = &arguments.output;
    if path.exists() {
        return Err(Failure::new(format!("{} exists", path.display())).hint("choose another name with -o"));
    }
    let values = synthetic::random(arguments.seed);
    let written = synthetic::write(&card, &values, path, arguments.layout, arguments.dtype);
    if written.is_err() {
        // Nothing is left behind, as far as the system allows it.
        let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    }
    written?;
    terminal::print(&path.display().to_string());
    Ok(())
}
