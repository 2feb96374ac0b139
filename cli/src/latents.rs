//! Latents in safetensors files: one f32 tensor `latents` `[1, c, h, w]`.

use std::path::Path;

use engine::pipeline::Latents;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::failure::{Failure, Result};

const NAME: &str = "latents";

/// Latents of a picture of 8192 x 8192 with 64 channels would be smaller.
const MAX_BYTES: u64 = 1 << 28;

/// Reads `--latents-in`.
pub(crate) fn read(path: &Path) -> Result<Latents> {
    let fail = |error: std::io::Error| Failure::io("read", path, &error);
    let wrong = |what: &str| {
        Failure::new(format!("{} holds no latents: {what}", path.display())).hint(
            "a safetensors file with one f32 tensor `latents` [1, channels, height / 8, width / 8] is wanted",
        )
    };
    if std::fs::metadata(path).map_err(fail)?.len() > MAX_BYTES {
        return Err(wrong("it is too large"));
    }
    let bytes = std::fs::read(path).map_err(fail)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(&e.to_string()))?;
    let tensor = file.tensor(NAME).map_err(|_| wrong("it has no tensor of that name"))?;
    let (Dtype::F32, &[1, c, h, w]) = (tensor.dtype(), tensor.shape()) else {
        return Err(wrong(&format!("its tensor is {} {:?}", tensor.dtype(), tensor.shape())));
    };
    let (words, _) = tensor.data().as_chunks::<4>();
    Ok(Latents { shape: [c, h, w], data: words.iter().map(|&w| f32::from_le_bytes(w)).collect() })
}

/// The bytes of `--latents-out`.
pub(crate) fn encode(latents: &Latents) -> Vec<u8> {
    let [c, h, w] = latents.shape;
    let data: Vec<u8> = latents.data.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![1, c, h, w], &data).expect("latents have their shape");
    safetensors::serialize([(NAME, view)], None).expect("one tensor can be serialized")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latents_come_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("latents.safetensors");
        let latents = Latents { shape: [2, 3, 4], data: (0..24).map(|i| i as f32 / 7.0).collect() };
        let bytes = encode(&latents);
        std::fs::write(&path, &bytes).expect("written");
        assert_eq!(read(&path).expect("read"), latents);
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).expect("written");
            assert!(read(&path).is_err(), "cut to {len}");
        }
    }
}
