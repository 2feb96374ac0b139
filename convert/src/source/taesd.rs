//! The original TAESD: two files, the decoder's and the encoder's, in which a layer's name is its number alone.
#![forbid(unsafe_code)]

use super::Source;
use crate::error::Error;

/// Where `source` is one of the two, puts `encoder.` or `decoder.` before its names, and adds the other one if that lies
/// beside it.
pub(super) fn join_halves(source: &mut Source) -> Result<(), Error> {
    let block = |name: &String| {
        name.split_once('.')
            .is_some_and(|(layer, rest)| layer.parse::<u16>().is_ok() && rest == "conv.0.weight")
    };
    if !source.tensors.keys().any(block) {
        return Ok(());
    }
    // The first layer of the decoder has no weights: it bounds the latents.
    let (half, other) =
        if source.tensors.contains_key("0.weight") { ("encoder", "decoder") } else { ("decoder", "encoder") };
    let tensors = std::mem::take(&mut source.tensors);
    source.tensors = tensors.into_iter().map(|(name, tensor)| (format!("{half}.{name}"), tensor)).collect();
    let name = source.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let beside = source.path.with_file_name(name.replace(half, other));
    if name.contains(half) && beside.is_file() {
        source.add_file(&beside, &format!("{other}."))?;
    }
    Ok(())
}
