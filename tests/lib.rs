//! Helpers shared by the cross-crate tests, which stand beside this file.
#![forbid(unsafe_code)]

pub mod families;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use convert::{Options, Quant};
use engine::format::ModelFile;
use engine::pipeline::{Pipeline, Settings};
use engine::precision::Precision;
use safetensors::{Dtype, SafeTensors};
pub use sdfast::compare::measure::{median, psnr, relative_error};

/// The folder `models/demo`.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

/// The folder `tests/data`.
pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// A golden file: named tensors as f32, and the file's metadata.
pub struct Golden {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    metadata: HashMap<String, String>,
}

impl Golden {
    /// Reads a whole `.safetensors` file; token ids become floats, which hold them exactly.
    pub fn open(path: &Path) -> Golden {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, t)| {
            let words = t.data().chunks_exact(4).map(|b| b.try_into().unwrap());
            let values = match t.dtype() {
                Dtype::F32 => words.map(f32::from_le_bytes).collect(),
                Dtype::I32 => words.map(|b| i32::from_le_bytes(b) as f32).collect(),
                other => panic!("{name} in {} is {other:?}", path.display()),
            };
            (name.to_string(), (t.shape().to_vec(), values))
        });
        Golden { tensors: tensors.collect(), metadata: header.metadata().clone().unwrap_or_default() }
    }

    /// Of these tensors.
    pub fn of(tensors: Vec<(&str, Vec<usize>, Vec<f32>)>) -> Golden {
        let tensors = tensors.into_iter().map(|(name, shape, values)| (name.to_owned(), (shape, values)));
        Golden { tensors: tensors.collect(), metadata: HashMap::new() }
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.entry(name).0
    }

    /// The numbers of a tensor, row-major.
    pub fn values(&self, name: &str) -> &[f32] {
        &self.entry(name).1
    }

    /// Row `i` along the first axis.
    pub fn row(&self, name: &str, i: usize) -> &[f32] {
        let (shape, values) = self.entry(name);
        let len = shape[1..].iter().product();
        &values[i * len..][..len]
    }

    /// Row `i` of a tensor of token ids.
    pub fn ids(&self, name: &str, i: usize) -> Vec<u32> {
        self.row(name, i).iter().map(|&v| v as u32).collect()
    }

    /// A string of the metadata.
    pub fn text(&self, key: &str) -> &str {
        &self.metadata[key]
    }

    /// A number of the metadata.
    pub fn number(&self, key: &str) -> f64 {
        self.metadata[key].parse().unwrap()
    }

    fn entry(&self, name: &str) -> &(Vec<usize>, Vec<f32>) {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
}

/// The checkpoint, converted with `--quant quant`.
pub fn model(checkpoint: &Path, quant: Quant) -> ModelFile {
    converted(Options { checkpoint: checkpoint.to_owned(), quant, ..Options::default() })
}

/// What `options` make of their checkpoint; the file is gone with the value.
pub fn converted(options: Options) -> ModelFile {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model.sdq");
    let options = Options { output: Some(output.clone()), ..options };
    convert::convert(&options, &|_| {}).unwrap_or_else(|e| panic!("{}: {e}", options.checkpoint.display()));
    ModelFile::open(&output).unwrap()
}

/// A pipeline for the checkpoint, converted with `--quant quant`, on all processors.
pub fn pipeline(checkpoint: &Path, quant: Quant, precision: Precision) -> Pipeline {
    Pipeline::new(model(checkpoint, quant), Settings { precision, ..Settings::default() }).unwrap()
}

/// `[c, h * w]` to `[h * w, c]`.
pub fn pixels(planar: &[f32], c: usize) -> Vec<f32> {
    let n = planar.len() / c;
    (0..planar.len()).map(|i| planar[i % c * n + i / c]).collect()
}

/// Writes a line that shows in a test run that passes, too.
pub fn report(line: &str) {
    let mut past_the_harness = std::io::stderr().lock();
    writeln!(past_the_harness, "{line}").unwrap();
}

/// The largest `|got - want|`.
pub fn max_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(&g, &w)| (g as f64 - w as f64).abs()).fold(0., f64::max)
}

/// The cosine of the angle between two tensors.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&p, &q)| p as f64 * q as f64).sum::<f64>();
    assert_eq!(a.len(), b.len());
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures() {
        assert_eq!(max_error(&[3., 4.5], &[3., 4.]), 0.5);
        assert!((cosine(&[1., 1.], &[1., 0.]) - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
