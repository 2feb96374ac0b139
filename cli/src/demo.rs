//! The model that is part of the program.

use engine::format::ModelFile;

use crate::failure::{Failure, Result};

/// What its pictures say of it.
pub(crate) const NAME: &str = "demo";

/// Opens it.
pub(crate) fn open() -> Result<ModelFile> {
    Err(Failure::new("no model is given").hint("name one with -m MODEL.sdq"))
}
