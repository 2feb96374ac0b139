//! The `.sdq` file: what is written is read, and no bytes whatever make the reader panic.

use std::path::Path;

use engine::card::{
    BetaSchedule, Card, ClipActivation, ClipConfig, Defaults, Family, Prediction, Provenance, ScheduleConfig,
    TimestepSpacing, UnetConfig, VaeConfig,
};
use engine::format::{Error, Layout, ModelFile, Tokenizer, Writer, xxh64};
use engine::graph::weight::{OutputOrder, Role, Stored, WeightKind, WeightSpec};
use kernels::layout::Encoding;

fn card() -> Card {
    Card {
        family: Family::Sd15,
        text_encoders: vec![ClipConfig {
            vocab_size: 8,
            hidden_size: 16,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            max_position_embeddings: 77,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            bos_token_id: 6,
            eos_token_id: 7,
            pad_token_id: 7,
            output_layer: 1,
            output_norm: true,
            projection_dim: None,
        }],
        unet: UnetConfig {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![32, 64],
            down_layers: vec![vec![1], vec![0]],
            mid_layers: Some(1),
            up_layers: vec![vec![0, 0], vec![1, 1]],
            num_attention_heads: vec![4, 4],
            cross_attention_dim: 16,
            norm_num_groups: 32,
            use_linear_projection: false,
            addition_embed: None,
            time_cond_proj_dim: None,
        },
        vae: VaeConfig {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![32, 32],
            layers_per_block: 1,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: 0.0,
            latents_mean: Vec::new(),
            latents_std: Vec::new(),
            use_quant_conv: true,
            mid_block_add_attention: true,
            tiny: None,
        },
        schedule: ScheduleConfig {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type: Prediction::Epsilon,
            rescale_betas_zero_snr: false,
            timestep_spacing: TimestepSpacing::Leading,
            steps_offset: 1,
            set_alpha_to_one: false,
            edm: None,
        },
        defaults: Defaults { width: 64, height: 64, steps: 20, guidance_scale: 7.5, sampler: "ddim".into() },
        provenance: Provenance { converter: "test".into(), quant: "q8".into() },
    }
}

fn parts() -> Vec<(&'static str, Vec<(WeightSpec, Stored)>)> {
    let matrix = |n, kh, kw, k, order| WeightKind::Matrix { n, kh, kw, k, order };
    let spec = |name: &str, kind, role, encoding: Encoding| {
        (WeightSpec { name: name.into(), kind, role }, Stored::from(encoding))
    };
    let factors = |(spec, stored), name: &str| (spec, Stored { factors: Some(name.into()), ..stored });
    let vector =
        |name: &str, len, order| spec(name, WeightKind::Vector { len, order }, Role::Vector, Encoding::F32);
    let plain = OutputOrder::Plain;
    vec![
        (
            "text_encoder",
            vec![
                spec(
                    "text_encoder.tokens",
                    WeightKind::Table { rows: 8, cols: 16 },
                    Role::Table,
                    Encoding::F16,
                ),
                spec("text_encoder.q", matrix(16, 1, 1, 16, plain), Role::SelfQkv, Encoding::Q8),
            ],
        ),
        (
            "unet",
            vec![
                vector("unet.conv.factors", 65, plain),
                factors(
                    spec("unet.conv", matrix(17, 3, 1, 65, plain), Role::Conv, Encoding::Q4),
                    "unet.conv.factors",
                ),
                vector("unet.conv.bias", 17, plain),
                spec("unet.ff", matrix(24, 1, 1, 8, OutputOrder::Geglu), Role::MlpIn, Encoding::Bf16),
                vector("unet.ff.bias", 24, OutputOrder::Geglu),
            ],
        ),
        ("vae_decoder", vec![spec("vae.out", matrix(3, 1, 1, 4, plain), Role::ConvOut, Encoding::F32)]),
    ]
}

/// Place of the factors.
const FACTORS: usize = 2;

/// What tensor `i` holds in these tests.
fn contents(i: usize, len: usize) -> Vec<u8> {
    if i == FACTORS {
        return (0..len / 4).flat_map(|at| (0.5 + at as f32).to_le_bytes()).collect();
    }
    (0..len).map(|b| (b * 31 + i * 7 + (b >> 8)) as u8).collect()
}

fn write(path: &Path) -> u64 {
    let tokenizer = Tokenizer { vocab: b"{\"a\":0}", merges: b"#version: 0.2\n" };
    let layout = Layout::new(&card(), tokenizer, &parts()).unwrap();
    let writer = Writer::create(path, layout).unwrap();
    std::thread::scope(|scope| {
        for i in 0..writer.layout().tensors().len() {
            let writer = &writer;
            scope.spawn(move || {
                writer.write(i, &contents(i, writer.layout().tensors()[i].len as usize)).unwrap()
            });
        }
    });
    writer.finish().unwrap()
}

#[test]
fn round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    let bytes = write(&path);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the file is left");

    let model = ModelFile::open(&path).unwrap();
    assert_eq!(model.card(), &card());
    assert_eq!(model.vocab(), b"{\"a\":0}");
    assert_eq!(model.merges(), b"#version: 0.2\n");
    assert_eq!(model.file_bytes(), bytes);
    model.verify().unwrap();
    let names: Vec<&str> = model.parts().iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["text_encoder", "unet", "vae_decoder"]);
    let specs: Vec<_> = parts().into_iter().flat_map(|(_, specs)| specs).collect();
    assert_eq!(model.tensors().len(), specs.len());
    for (i, (tensor, (spec, stored))) in model.tensors().iter().zip(&specs).enumerate() {
        let factors = stored.factors.as_ref().map(|_| FACTORS);
        assert_eq!((&tensor.name, tensor.kind, tensor.factors), (&spec.name, spec.kind, factors));
        assert_eq!(Some(tensor.encoding), stored.encoding);
        assert_eq!(model.tensor(&spec.name), Some(tensor));
        let bytes = model.bytes(tensor);
        assert!(bytes.as_ptr().addr().is_multiple_of(64));
        assert_eq!(bytes, contents(i, bytes.len()));
        let mut copy = vec![0; bytes.len()];
        model.read_at(&mut copy, tensor.offset).unwrap();
        assert_eq!(copy, bytes);
        if let WeightKind::Matrix { .. } = tensor.kind {
            assert_eq!(model.weight(tensor).unwrap().shape, tensor.kind.shape().unwrap());
        }
    }
    let factors = model.factors(model.tensor("unet.conv").unwrap()).unwrap();
    assert_eq!((factors.len(), factors[64]), (65, 64.5));
    assert_eq!(model.tensor("unet.ff.bias").unwrap().len, 32 * 4, "a gated bias is as long as its matrix");
    assert!(model.parts().iter().all(|p| p.offset % 4096 == 0));
}

#[test]
fn dropped_writer_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    let tokenizer = Tokenizer { vocab: b"{}", merges: b"" };
    drop(Writer::create(&path, Layout::new(&card(), tokenizer, &parts()).unwrap()).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let missing = folder.path().join("no/folder/a.sdq");
    let error = Writer::create(&missing, Layout::new(&card(), tokenizer, &parts()).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Io { action: "write", .. }), "{error}");
}

#[test]
fn no_room_is_said_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    let dim = 1 << 20;
    let kind = WeightKind::Matrix { n: dim, kh: 16, kw: 16, k: dim, order: OutputOrder::Plain };
    let spec = WeightSpec { name: "unet.huge".into(), kind, role: Role::Conv };
    let tokenizer = Tokenizer { vocab: b"{}", merges: b"" };
    let layout = Layout::new(&card(), tokenizer, &[("unet", vec![(spec, Encoding::F32.into())])]).unwrap();
    assert!(layout.file_bytes() > 1 << 50);
    let error = Writer::create(&path, layout).unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn layouts_that_cannot_be() {
    let tokenizer = Tokenizer { vocab: b"{}", merges: b"" };
    let mut twice = parts();
    let again = twice[0].1[0].clone();
    twice[1].1.push(again);
    assert!(Layout::new(&card(), tokenizer, &twice).is_err());
    let mut wrong = parts();
    wrong[1].1[2].1 = Encoding::F16.into(); // a bias
    assert!(Layout::new(&card(), tokenizer, &wrong).is_err());
    for (tensor, factors) in
        [(1, "unet.none"), (1, "unet.conv.bias"), (3, "unet.conv.factors"), (1, "unet.ff")]
    {
        let mut wrong = parts();
        wrong[1].1[tensor].1.factors = Some(factors.into());
        assert!(Layout::new(&card(), tokenizer, &wrong).is_err(), "{factors} for tensor {tensor}");
    }
    let mut broken = card();
    broken.unet.block_out_channels[1] = 33;
    assert!(Layout::new(&broken, tokenizer, &parts()).is_err());
}

/// Puts the header's checksum right, so that what lies behind it is reached.
fn repair(bytes: &mut [u8]) {
    let Some(count) = bytes.get(12..16) else { return };
    let end = 32 + 32 * u32::from_le_bytes(count.try_into().unwrap()).min(64) as usize;
    if bytes.len() < end + 8 {
        return;
    }
    for entry in 0..(end - 32) / 32 {
        let at = 32 + 32 * entry;
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let range = number(at + 8)..number(at + 8).saturating_add(number(at + 16));
        if let Some(section) = bytes.get(range)
            && &bytes[at..at + 4] != b"data"
        {
            let sum = xxh64(section);
            bytes[at + 24..at + 32].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let sum = xxh64(&bytes[..end]);
    bytes[end..end + 8].copy_from_slice(&sum.to_le_bytes());
}

/// Opens the bytes as a file; walks over everything where they are accepted.
fn open(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    std::fs::write(path, bytes).unwrap();
    let model = ModelFile::open(path)?;
    for tensor in model.tensors() {
        assert_eq!(model.bytes(tensor).len() as u64, tensor.len);
        let _ = (model.weight(tensor), model.factors(tensor));
    }
    model.verify()
}

#[test]
fn every_truncation_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    write(&path);
    let whole = std::fs::read(&path).unwrap();
    let cut = folder.path().join("cut.sdq");
    for len in (0..2500).chain((2500..whole.len()).step_by(499)).chain([whole.len() - 1]) {
        let mut bytes = whole[..len].to_vec();
        assert!(open(&cut, &bytes).is_err(), "{len} bytes");
        if let Some(field) = bytes.get_mut(16..24) {
            field.copy_from_slice(&(len as u64).to_le_bytes());
            repair(&mut bytes);
            assert!(open(&cut, &bytes).is_err(), "{len} bytes with a header that says so");
        }
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(open(&cut, &longer), Err(Error::Length { .. })));
}

#[test]
fn every_mutation_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    write(&path);
    let whole = std::fs::read(&path).unwrap();
    let model = ModelFile::open(&path).unwrap();
    let mut covered = vec![false; whole.len()];
    let head = model.parts()[0].offset as usize;
    covered[..200].fill(true);
    model.tensors().iter().for_each(|t| covered[t.range()].fill(true));
    let changed = folder.path().join("changed.sdq");
    for at in (0..head.min(200)).chain((head..whole.len()).step_by(97)).filter(|&at| covered[at]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        assert!(open(&changed, &bytes).is_err(), "byte {at}");
    }
}

#[test]
fn factors_are_positive_and_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    write(&path);
    let whole = std::fs::read(&path).unwrap();
    let range = ModelFile::open(&path).unwrap().tensors()[FACTORS].range();
    let changed = folder.path().join("changed.sdq");
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY, 3e7, 3e-8] {
        for at in [range.start, range.end - 4] {
            let mut bytes = whole.clone();
            bytes[at..at + 4].copy_from_slice(&f32::to_le_bytes(bad));
            assert!(matches!(open(&changed, &bytes), Err(Error::Damaged { .. })), "{bad}");
        }
    }
}

#[test]
fn mutations_with_right_checksums_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    write(&path);
    let whole = std::fs::read(&path).unwrap();
    let model = ModelFile::open(&path).unwrap();
    let head = model.merges().as_ptr().addr() + model.merges().len() - model.vocab().as_ptr().addr();
    let head = whole.windows(7).position(|w| w == model.vocab()).unwrap() + head;
    let changed = folder.path().join("changed.sdq");
    let mut accepted = 0;
    for at in 0..head {
        for flip in [0x01, 0x80] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            repair(&mut bytes);
            accepted += usize::from(open(&changed, &bytes).is_ok());
        }
    }
    assert!(accepted > 0, "bytes of the vocabulary may be anything");
}

#[test]
fn other_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = ModelFile::open(&folder.path().join("none.sdq")).unwrap_err();
    assert!(matches!(missing, Error::Io { action: "open", .. }) && missing.hint().is_some(), "{missing}");
    assert!(matches!(ModelFile::open(folder.path()), Err(Error::NotSdq { .. })));
    let path = folder.path().join("a.sdq");
    for bytes in [&b""[..], b"PK\x03\x04", &[0; 5000]] {
        assert!(matches!(open(&path, bytes), Err(Error::NotSdq { .. })));
    }
    write(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8] = 2;
    assert!(matches!(open(&path, &bytes), Err(Error::Version { found: 2, .. })));
}

#[test]
fn built_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sdq");
    write(&path);
    let bytes = std::fs::read(&path).unwrap();
    let mut aligned = vec![[0u8; 64]; bytes.len().div_ceil(64) + 1];
    let room = aligned.as_flattened_mut();
    let start = room.as_ptr().align_offset(64);
    room[start..start + bytes.len()].copy_from_slice(&bytes);
    let leaked: &'static [u8] = aligned.leak().as_flattened();
    let model = ModelFile::from_static(&leaked[start..start + bytes.len()]).unwrap();
    model.verify().unwrap();
    assert!(model.path().is_none() && model.file().is_none());
    let mut tail = [0; 64];
    model.read_at(&mut tail, model.file_bytes() - 64).unwrap();
    assert!(model.read_at(&mut tail, model.file_bytes() - 63).is_err());
    assert!(model.read_at(&mut tail, u64::MAX).is_err());
    assert!(ModelFile::from_static(&leaked[start + 1..start + 1 + bytes.len()]).is_err());
}
