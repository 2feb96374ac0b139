//! The demo model through the converter, from its diffusers folder.

use std::path::{Path, PathBuf};

use convert::{Error, Options, Quant, convert};
use engine::card::{Family, Prediction};
use engine::format::ModelFile;
use engine::graph::weight::WeightKind;
use half::f16;
use safetensors::SafeTensors;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

fn options(folder: &Path, quant: Quant) -> Options {
    let output = folder.join(format!("{}.sdq", quant.name()));
    Options { checkpoint: demo(), output: Some(output), quant, ..Options::default() }
}

/// The values of the checkpoint, `[n, taps, k]`, and the taps.
fn source_values(name: &str, folders: &[(&str, SafeTensors<'_>)]) -> (Vec<f32>, usize) {
    let (part, key) = name.split_once('.').unwrap();
    let tensor = folders.iter().find(|(n, _)| *n == part).unwrap().1.tensor(key).unwrap();
    let values: Vec<f32> =
        tensor.data().as_chunks().0.iter().map(|b: &[u8; 2]| f16::from_le_bytes(*b).to_f32()).collect();
    let [n, k, kh, kw] = tensor.shape() else { return (values, 1) };
    let (k, taps) = (*k, kh * kw);
    let moved =
        (0..n * taps * k).map(|i| values[(i / (taps * k) * k + i % k) * taps + i / k % taps]).collect();
    (moved, taps)
}

#[test]
fn weights_are_those_of_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<(&str, Vec<u8>)> = ["unet", "vae", "text_encoder"]
        .into_iter()
        .map(|part| {
            let stem = if part == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
            (part, std::fs::read(demo().join(part).join(format!("{stem}.safetensors"))).unwrap())
        })
        .collect();
    let parts: Vec<(&str, SafeTensors<'_>)> =
        files.iter().map(|(part, bytes)| (*part, SafeTensors::deserialize(bytes).unwrap())).collect();
    let count: usize = parts.iter().map(|(_, t)| t.len()).sum();
    for (quant, bound) in [(Quant::F16, 0.0), (Quant::Q8, 0.013), (Quant::Q4, 0.13)] {
        let options = options(folder.path(), quant);
        let summary = convert(&options, &|_| {}).unwrap();
        let model = ModelFile::open(options.output.as_deref().unwrap()).unwrap();
        model.verify().unwrap();
        assert_eq!(model.tensors().len(), count, "every tensor of the folder is in the file");
        assert_eq!(summary.file_bytes, model.file_bytes());
        let mut worst: f64 = 0.0;
        for tensor in model.tensors() {
            let (values, _) = source_values(&tensor.name, &parts);
            let stored: Vec<f32> = match tensor.kind {
                WeightKind::Matrix { n, kh, kw, k, order } => {
                    let all = kernels::quantize::decode(
                        tensor.encoding,
                        tensor.kind.shape().unwrap(),
                        model.bytes(tensor),
                    );
                    let row = kh * kw * k;
                    let mut plain = vec![0.0; n * row];
                    for i in 0..order.stored(n) {
                        match order.source(n, i) {
                            Some(from) => plain[from * row..][..row].copy_from_slice(&all[i * row..][..row]),
                            None => assert!(all[i * row..][..row].iter().all(|v| *v == 0.0)),
                        }
                    }
                    plain
                }
                WeightKind::Vector { len, order } => {
                    let all: &[f32] = bytemuck::cast_slice(model.bytes(tensor));
                    let mut plain = vec![0.0; len];
                    (0..order.stored(len))
                        .filter_map(|i| Some((i, order.source(len, i)?)))
                        .for_each(|(i, from)| plain[from] = all[i]);
                    plain
                }
                WeightKind::Table { .. } => {
                    let all: &[f16] = bytemuck::cast_slice(model.bytes(tensor));
                    all.iter().map(|v| v.to_f32()).collect()
                }
            };
            let error: f64 = values.iter().zip(&stored).map(|(v, s)| f64::from(v - s).powi(2)).sum();
            let energy: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
            let error = (error / energy.max(1e-30)).sqrt();
            assert!(error <= bound, "{} {}: {error}", quant.name(), tensor.name);
            worst = worst.max(error);
        }
        sdfast_tests::report(&format!(
            "{}: {} bytes, worst error of a tensor {worst:.4}, UNet {:.2} bits per weight",
            quant.name(),
            summary.file_bytes,
            summary.unet_bits_per_weight
        ));
    }
}

#[test]
fn the_card_is_that_of_the_configs() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), Quant::Q8);
    let card = convert(&options, &|_| {}).unwrap().card.model().unwrap().clone();
    assert_eq!(card.family, Family::Sd15);
    assert_eq!(card.unet.block_out_channels, [64, 96, 128]);
    assert_eq!(card.unet.down_layers, [[1], [1], [0]]);
    assert_eq!(card.unet.up_layers, [[0, 0], [1, 1], [1, 1]]);
    assert_eq!(card.unet.mid_layers, Some(1));
    assert_eq!(card.unet.num_attention_heads, [8, 8, 8]);
    assert_eq!(card.text_encoders[0].num_attention_heads, 4);
    assert_eq!(card.text_encoders[0].pad_token_id, 49407);
    assert_eq!(card.vae.block_out_channels, [64; 4]);
    assert_eq!(card.vae.scaling_factor, 0.38247);
    assert_eq!(card.schedule.prediction_type, Prediction::Epsilon);
    assert_eq!(card.schedule.steps_offset, 1);
    assert_eq!((card.defaults.width, card.defaults.height), (128, 128));
}

#[test]
fn the_same_bytes_whatever_the_threads() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<Vec<u8>> = [1, 2, 3]
        .into_iter()
        .map(|threads| {
            let options =
                Options { threads: Some(threads), force: true, ..options(folder.path(), Quant::Q4) };
            convert(&options, &|_| {}).unwrap();
            std::fs::read(options.output.unwrap()).unwrap()
        })
        .collect();
    assert!(bytes.iter().all(|b| *b == bytes[0]));
}

#[test]
fn an_existing_output_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), Quant::Q8);
    std::fs::write(options.output.as_ref().unwrap(), "precious").unwrap();
    let error = convert(&options, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }) && error.hint().is_some(), "{error}");
    assert_eq!(std::fs::read(options.output.unwrap()).unwrap(), b"precious");
}

#[test]
fn reports_and_rules() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let keep = vec!["vae.*=f16".to_owned(), "unet.*.attn2.to_?.weight=bf16".to_owned()];
    let options = Options { keep, report: Some(report.clone()), ..options(folder.path(), Quant::Q8) };
    let summary = convert(&options, &|_| {}).unwrap();
    for tensor in &summary.tensors {
        let matrix = tensor.shape.len() > 1 && !tensor.name.contains("embeddings");
        let expected = match () {
            () if !matrix => continue,
            () if tensor.name.starts_with("vae.") => "f16",
            () if tensor.name.contains("attn2.to_") && !tensor.name.contains("to_out") => "bf16",
            () => continue,
        };
        assert_eq!(tensor.encoding, expected, "{}", tensor.name);
    }
    let q8 = summary.tensors.iter().filter(|t| t.encoding == "q8");
    assert!(q8.clone().count() > 50 && q8.clone().all(|t| t.error.is_some_and(|e| e > 0.001 && e < 0.02)));
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(json["tensors"].as_array().unwrap().len(), summary.tensors.len());
    assert_eq!(json["file_bytes"], summary.file_bytes);
}
