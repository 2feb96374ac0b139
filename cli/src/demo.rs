//! The model that is part of the program, so that a fresh clone makes a picture.

use engine::format::{Aligned, ModelFile};

use crate::failure::Result;

/// What its pictures say of it.
pub(crate) const NAME: &str = "demo";

/// What `sdconv models/demo/model` makes.
static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../../models/demo/demo.q8.sdq"));

/// Opens it.
pub(crate) fn open() -> Result<ModelFile> {
    Ok(ModelFile::from_static(&MODEL.0)?)
}
