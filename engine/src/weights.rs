//! From the names that a network wants to the bytes of a file.
#![forbid(unsafe_code)]

use kernels::layout::Encoding;

use crate::error::{Error, Result};
use crate::format::ModelFile;
use crate::graph::weight::{WeightKind, WeightSpec};

/// The encoding in `file` of each of `wanted` (`None` for vectors and tables), after checking that the file has them all in
/// the shapes wanted.
pub fn encodings(file: &ModelFile, wanted: &[WeightSpec]) -> Result<Vec<Option<Encoding>>> {
    let each = wanted.iter().map(|spec| {
        let tensor =
            file.tensor(&spec.name).ok_or_else(|| Error::TensorMissing { name: spec.name.clone() })?;
        if tensor.kind != spec.kind {
            return Err(Error::TensorShape { name: spec.name.clone() });
        }
        Ok(matches!(spec.kind, WeightKind::Matrix { .. }).then_some(tensor.encoding))
    });
    each.collect()
}

/// The bytes of each of `wanted`, which [`encodings`] has checked.
pub fn bytes<'a>(file: &'a ModelFile, wanted: &[WeightSpec]) -> Vec<&'a [u8]> {
    let find =
        |spec: &WeightSpec| file.tensor(&spec.name).expect("a plan is made for tensors that are there");
    wanted.iter().map(|spec| file.bytes(find(spec))).collect()
}
