//! Checkpoints that are broken, lie, are something else or want to run a program: each is one sentence, and nothing is
//! left behind.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use convert::synthetic::{self, Layout, Number, Tensor};
use convert::{Error, Options, convert, inspect};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Converts, expects a refusal, and returns what is said: the sentence and the hint.
fn refused(checkpoint: &Path, set: impl Fn(&mut Options)) -> (Error, String) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.sdq");
    let mut options =
        Options { checkpoint: checkpoint.to_owned(), output: Some(output), ..Options::default() };
    set(&mut options);
    let error = convert(&options, &|_| {}).expect_err("it is refused");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    let text = format!("{error} ({})", error.hint().unwrap_or_default());
    assert!(!error.to_string().contains('\n') && text.len() < 900, "{text}");
    (error, text)
}

/// A safetensors file with these tensors of zeros.
fn small(path: &Path, tensors: &[(&str, &[usize])]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, s)| vec![0; s.iter().product::<usize>() * 2]).collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        (name.to_string(), TensorView::new(Dtype::F16, shape.to_vec(), data).unwrap())
    });
    serialize_to_file(views, None, path).unwrap();
}

/// A miniature in a layout, its values changed.
fn tiny(folder: &Path, layout: Layout, change: impl Fn(&Tensor, &mut Vec<f32>)) -> PathBuf {
    let path = folder.join(format!("{layout:?}"));
    let card = synthetic::card("tiny-sd15").unwrap();
    let random = synthetic::random(7);
    let values = |t: &Tensor| {
        let mut values = random(t);
        change(t, &mut values);
        values
    };
    synthetic::write(&card, &values, &path, layout, Number::F16).unwrap();
    path
}

#[test]
fn files_that_are_something_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let unet: &[(&str, &[usize])] = &[
        ("input_blocks.0.0.weight", &[4, 4, 3, 3]),
        ("input_blocks.0.0.bias", &[4]),
        ("input_blocks.1.0.in_layers.0.weight", &[4]),
        ("middle_block.0.in_layers.0.weight", &[4]),
    ];
    let prefixed: Vec<(String, &[usize])> =
        unet.iter().map(|(name, shape)| (format!("model.diffusion_model.{name}"), *shape)).collect();
    let prefixed: Vec<(&str, &[usize])> = prefixed.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    type Tensors<'a> = &'a [(&'a str, &'a [usize])];
    let cases: [(Tensors<'_>, &str); 24] = [
        (&[("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", &[4, 8])], "a LoRA"),
        (&[("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", &[4, 8])], "a LoRA"),
        (&[("control_model.time_embed.0.weight", &[4, 8])], "a ControlNet"),
        (
            &[("controlnet_cond_embedding.conv_in.weight", &[4, 3, 3, 3]), ("conv_in.weight", &[4, 4, 3, 3])],
            "a ControlNet",
        ),
        (&[("first_stage_model.decoder.conv_in.weight", &[4, 4, 3, 3])], "a VAE alone"),
        (
            &[("decoder.conv_in.weight", &[4, 4, 3, 3]), ("encoder.conv_in.weight", &[4, 3, 3, 3])],
            "a VAE alone",
        ),
        (&[("text_model.embeddings.token_embedding.weight", &[8, 4])], "a text encoder alone"),
        (unet, "a UNet alone"),
        (&prefixed, "a UNet alone"),
        (&[("emb_params", &[1, 8])], "an embedding"),
        (&[("image_proj.proj.weight", &[8, 8]), ("ip_adapter.1.to_k_ip.weight", &[8, 8])], "an IP-Adapter"),
        (&[("conv_first.weight", &[8, 3, 3, 3])], "an upscaler"),
        (&[("adapter.body.0.resnets.0.block1.weight", &[8, 8, 3, 3])], "a T2I-Adapter"),
        (&[("body.0.block1.weight", &[8, 8, 3, 3]), ("conv_in.weight", &[8, 8, 3, 3])], "a T2I-Adapter"),
        (&[("<my-token>", &[768])], "an embedding"),
        (&[("clip_l", &[2, 768]), ("clip_g", &[2, 1280])], "an embedding"),
        (&[("decoder.layers.1.weight", &[8, 4, 3, 3])], "a part of a tiny VAE"),
        (&[("vision_model.embeddings.class_embedding", &[8])], "an image encoder"),
        (&[("down_blocks.0.motion_modules.0.norm.weight", &[8])], "a motion module"),
        (&[("joint_blocks.0.context_block.adaLN_modulation.1.bias", &[8])], "a Stable Diffusion 3 model"),
        (&[("model.diffusion_model.label_emb.weight", &[8, 8])], "a Stable Diffusion upscaler model"),
        (&[("lora_unet_mid.alpha", &[1]), ("lora_unet_mid.hada_w1_a", &[4, 8])], "a LoRA (LoHa)"),
        (&[("double_blocks.0.img_attn.norm.key_norm.scale", &[8])], "a FLUX.1 model"),
        (&[("something.else.weight", &[8])], "belong to no network"),
    ];
    for (tensors, what) in cases {
        small(&path, tensors);
        let (_, text) = refused(&path, |_| {});
        assert!(text.contains(what), "{what}: {text}");
        let inspection = inspect(&path).unwrap();
        assert!(inspection.card.is_none() && inspection.fault.unwrap().contains(what));
    }
    for (bytes, what) in [
        (&b""[..], "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"\x89SDQ\r\n\x1a\n0000000000000000000000000", ".sdq"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R.", "a pickle"),
        (b"PK\x03\x04 and no more", "zip"),
        (b"GGUF\x03\0\0\0", "cut short"),
    ] {
        fs::write(&path, bytes).unwrap();
        let (_, text) = refused(&path, |_| {});
        assert!(text.contains(what), "{what}: {text}");
    }
    let (error, _) = refused(&folder.path().join("missing.ckpt"), |_| {});
    assert!(matches!(error, Error::Io { action: "open", .. }));
}

#[test]
fn headers_that_lie() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let file = |len: u64, header: &str, data: usize| {
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend(std::iter::repeat_n(0, data));
        fs::write(&path, bytes).unwrap();
    };
    let entry = |dtype: &str, shape: &str, from: i64, to: i64| {
        format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
    };
    let one = entry("F16", "[4]", 0, 8);
    let cases = [
        (u64::MAX, "{}".to_owned(), "is no checkpoint"),
        (1 << 20, "{}".to_owned(), "should be"),
        (2, "{}".to_owned(), "has no tensors"),
        (9, "{\"a\":1234".to_owned(), "header"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[4]", 8, 16)), "needs"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[4]", 0, 1 << 40)), "need"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[4]", 8, 0)), "overlaps"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[4]", -8, 0)), "header"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[5]", 0, 8)), "aren't f16 [5]"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[4294967296,4294967296,4]", 0, 8)), "aren't f16"),
        (0, format!("{{\"a\":{}}}", entry("F16", "[-4]", 0, 8)), "header"),
        (0, format!("{{\"a\":{}}}", entry("F12", "[4]", 0, 8)), "unknown type F12"),
        (0, format!("{{\"a\":{one},\"b\":{}}}", entry("F16", "[4]", 4, 12)), "overlaps"),
        (0, format!("{{\"a\":{one},\"a\":{}}}", entry("F16", "[4]", 8, 16)), "twice"),
    ];
    for (len, header, what) in cases {
        let len = if len == 0 { header.len() as u64 } else { len };
        file(len, &header, 16);
        let (_, text) = refused(&path, |_| {});
        let what = if what == "needs" { "belong to no network" } else { what };
        assert!(text.contains(what), "{header}: {text}");
    }
}

#[test]
fn pickles_that_call_things() {
    let folder = tempfile::tempdir().unwrap();
    let witness = folder.path().join("witness");
    let command = format!("touch {}", witness.display());
    // A whole checkpoint whose dictionary ends with a call.
    for layout in [Layout::Zip, Layout::Pickle] {
        let path = tiny(folder.path(), layout, |_, _| {});
        let mut bytes = fs::read(&path).unwrap();
        let needle = b"X\x0b\0\0\0global_stepJ";
        let at = bytes.windows(needle.len()).position(|w| w == needle).expect("the step is in the pickle");
        // "global_step": J 4 bytes, u . => as many bytes that name a function.
        let call = b"cos\nsystem\n";
        bytes[at..at + call.len()].copy_from_slice(call);
        fs::write(&path, &bytes).unwrap();
        let (_, text) = refused(&path, |_| {});
        assert!(text.contains("wants to run os.system"), "{text}");
    }
    let path = folder.path().join("x.ckpt");
    let mut bytes =
        b"\x80\x02\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19.\x80\x02M\xE9\x03.\x80\x02}.".to_vec();
    bytes.extend_from_slice(b"\x80\x02cbuiltins\neval\nX");
    bytes.extend_from_slice(&(command.len() as u32).to_le_bytes());
    bytes.extend_from_slice(command.as_bytes());
    bytes.extend_from_slice(b"\x85R.\x80\x02].");
    fs::write(&path, bytes).unwrap();
    let (_, text) = refused(&path, |_| {});
    assert!(text.contains("wants to run builtins.eval"), "{text}");
    assert!(!witness.exists());
}

/// The embedding that the WebUI saves: `{"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}}`.
#[test]
fn embeddings_in_pickles() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pt");
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.push(b'X');
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    };
    let mut bytes =
        b"\x80\x02\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19.\x80\x02M\xE9\x03.\x80\x02}.".to_vec();
    bytes.extend_from_slice(b"\x80\x02}(");
    text(&mut bytes, "string_to_token");
    bytes.extend_from_slice(b"}");
    text(&mut bytes, "*");
    bytes.extend_from_slice(b"M\x09\x01s");
    text(&mut bytes, "string_to_param");
    bytes.extend_from_slice(b"}");
    text(&mut bytes, "*");
    bytes.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(&mut bytes, "storage");
    bytes.extend_from_slice(b"ctorch\nFloatStorage\n");
    text(&mut bytes, "0");
    text(&mut bytes, "cpu");
    bytes.extend_from_slice(b"M\0\x03NtQK\0K\x01M\0\x03\x86M\0\x03K\x01\x86\x89}tRsu.");
    bytes.extend_from_slice(b"\x80\x02](");
    text(&mut bytes, "0");
    bytes.extend_from_slice(b"e.");
    bytes.extend_from_slice(&768u64.to_le_bytes());
    bytes.extend_from_slice(&[0; 768 * 4]);
    fs::write(&path, &bytes).unwrap();
    let (_, text) = refused(&path, |_| {});
    assert!(text.contains("is an embedding (textual inversion)"), "{text}");
}

/// Cuts a file shorter and shorter, and changes single bytes: an error or a model, never a panic.
#[test]
fn every_layout_cut_and_changed() {
    let folder = tempfile::tempdir().unwrap();
    for layout in [Layout::Ldm, Layout::Zip, Layout::Pickle, Layout::Gguf] {
        let path = tiny(folder.path(), layout, |_, _| {});
        let len = fs::metadata(&path).unwrap().len();
        let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        // Headers stand in front, a zip's directory at the end.
        let head = 150_000.min(len);
        let front = (0..head).step_by(if head > 100_000 { 3001 } else { 997 });
        let back = (len - 100_000..len).step_by(3001).chain((len - 100..len).step_by(3));
        for at in front.chain(back).chain(0..40) {
            let mut byte = [0];
            file.seek(SeekFrom::Start(at)).unwrap();
            file.read_exact(&mut byte).unwrap();
            for value in [byte[0] ^ 0x80, byte[0] ^ 1] {
                file.seek(SeekFrom::Start(at)).unwrap();
                file.write_all(&[value]).unwrap();
                let _ = inspect(&path);
            }
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(&byte).unwrap();
        }
        assert!(inspect(&path).unwrap().card.is_some());
        for cut in (0..20).map(|i| len - 1 - i * (len / 21)).chain([head, 1000, 100, 30, 17, 9, 8, 4, 1]) {
            file.set_len(cut).unwrap();
            let (_, text) = refused(&path, |_| {});
            assert!(text.contains(&format!("{layout:?}")), "{cut} bytes of {layout:?}: {text}");
        }
    }
}

#[test]
fn weights_that_are_no_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let name = "unet.mid_block.resnets.0.conv1.weight";
    for bad in [f32::NAN, f32::INFINITY] {
        let path = tiny(folder.path(), Layout::Diffusers, |t, values| {
            if t.name == name {
                (values[5], values[700]) = (bad, -bad);
            }
        });
        let (error, text) = refused(&path, |_| {});
        assert!(matches!(error, Error::NotFinite { count: 2, .. }) && text.contains(name), "{text}");
        let output = Some(folder.path().join("forced.sdq"));
        let options = Options { checkpoint: path, output, force: true, ..Options::default() };
        let summary = convert(&options, &|_| {}).unwrap();
        assert!(summary.notes.iter().any(|n| n.starts_with("2 values")), "{:?}", summary.notes);
    }
}

#[test]
fn numbers_too_large_for_16_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large");
    let card = synthetic::card("tiny-sd15").unwrap();
    let random = synthetic::random(8);
    let values = |t: &Tensor| {
        let mut values = random(t);
        if t.name == "unet.conv_in.weight" {
            values[0] = 1e6;
        }
        values
    };
    synthetic::write(&card, &values, &path, Layout::Diffusers, Number::F32).unwrap();
    let (error, text) = refused(&path, |_| {});
    assert!(
        matches!(error, Error::Overflow { .. }) && text.contains("--keep 'unet.conv_in.weight=f32'"),
        "{text}"
    );
    let output = Some(folder.path().join("kept.sdq"));
    let keep = vec!["unet.conv_in.weight=f32".to_owned()];
    convert(&Options { checkpoint: path, output, keep, ..Options::default() }, &|_| {}).unwrap();
}

/// Rewrites a weights file of a folder with some tensors changed; `None` drops one.
fn rewrite(path: &Path, change: impl Fn(&str, Dtype, Vec<usize>) -> Option<(String, Dtype, Vec<usize>)>) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let views: Vec<(String, TensorView<'_>)> = file
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| {
            let (name, dtype, shape) = change(&name, view.dtype(), view.shape().to_vec())?;
            Some((name, TensorView::new(dtype, shape, view.data()).unwrap()))
        })
        .collect();
    let copy = path.with_extension("new");
    serialize_to_file(views, None, &copy).unwrap();
    fs::rename(copy, path).unwrap();
}

#[test]
fn tensors_missing_unexpected_and_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let unet = |path: &Path| path.join("unet/diffusion_pytorch_model.safetensors");
    let bias = "up_blocks.1.resnets.0.conv1.bias";

    let path = tiny(folder.path(), Layout::Diffusers, |_, _| {});
    rewrite(&unet(&path), |n, d, s| (n != bias).then(|| (n.to_owned(), d, s)));
    let (error, text) = refused(&path, |_| {});
    assert!(matches!(&error, Error::Missing { names, .. } if names == &[format!("unet.{bias}")]), "{text}");

    let path = tiny(folder.path(), Layout::Diffusers, |_, _| {});
    rewrite(&unet(&path), |n, d, s| {
        Some((n.replace("up_blocks.1.resnets.0.conv1", "up_blocks.1.more.0"), d, s))
    });
    let (_, text) = refused(&path, |_| {});
    assert!(text.contains("up_blocks.1.resnets.0.conv1"), "{text}");

    let path = tiny(folder.path(), Layout::Diffusers, |_, _| {});
    rewrite(&unet(&path), |n, d, s| Some((n.to_owned(), d, if n == bias { vec![s[0] / 2, 2] } else { s })));
    let (error, text) = refused(&path, |_| {});
    assert!(matches!(error, Error::Shape { .. }) && text.contains(bias), "{text}");

    let path = tiny(folder.path(), Layout::Diffusers, |_, _| {});
    rewrite(&unet(&path), |n, d, s| Some((n.to_owned(), if n == bias { Dtype::I16 } else { d }, s)));
    let (error, text) = refused(&path, |_| {});
    assert!(matches!(error, Error::Dtype { .. }) && text.contains("i16"), "{text}");

    // One tensor too many: refused, unless forced.
    let path = tiny(folder.path(), Layout::Diffusers, |_, _| {});
    let bytes = fs::read(unet(&path)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut views: Vec<(String, TensorView<'_>)> = file.tensors();
    let extra = views.iter().find(|(n, _)| n == bias).unwrap().1.clone();
    views.push(("down_blocks.0.motion.bias".into(), extra));
    serialize_to_file(views, None, &unet(&path)).unwrap();
    let (error, text) = refused(&path, |_| {});
    assert!(matches!(error, Error::Unexpected { .. }) && text.contains("motion.bias"), "{text}");
    let output = Some(folder.path().join("forced.sdq"));
    convert(&Options { checkpoint: path, output, force: true, ..Options::default() }, &|_| {}).unwrap();
}

#[test]
fn folders_that_lie() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny(folder.path(), Layout::Sharded, |_, _| {});
    let index = path.join("unet/diffusion_pytorch_model.safetensors.index.json");
    for (json, what) in [
        ("{", "EOF"),
        ("{\"weight_map\":{}}", "lacks"),
        ("{}", "no weight_map"),
        ("{\"weight_map\":{\"a\":\"../../etc/passwd\"}}", "no file beside it"),
        ("{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "no file beside it"),
        ("{\"weight_map\":{\"a\":\"missing.safetensors\"}}", "missing.safetensors"),
        ("{\"weight_map\":{\"a\":5}}", "no weight_map"),
    ] {
        fs::write(&index, json).unwrap();
        let (_, text) = refused(&path, |_| {});
        assert!(text.contains(what) || json.contains("{}"), "{json}: {text}");
    }
    let path = tiny(folder.path(), Layout::Diffusers, |_, _| {});
    for (file, key, value, what) in [
        ("unet/config.json", "act_fn", serde_json::json!("gelu"), "act_fn"),
        ("unet/config.json", "attention_head_dim", serde_json::json!("many"), "attention heads"),
        ("unet/config.json", "attention_head_dim", serde_json::json!(7), "isn't a multiple of 7"),
        ("unet/config.json", "attention_head_dim", serde_json::json!([8, 8]), "attention heads"),
        ("unet/config.json", "attention_head_dim", serde_json::json!(0), "num_attention_heads"),
        ("unet/config.json", "norm_num_groups", serde_json::json!(0), "norm_num_groups"),
        ("unet/config.json", "sample_size", serde_json::json!(u64::MAX), "pixels"),
        ("vae/config.json", "scaling_factor", serde_json::json!(0.0), "scaling_factor"),
        ("text_encoder/config.json", "hidden_act", serde_json::json!("relu"), "relu"),
        ("text_encoder/config.json", "num_attention_heads", serde_json::json!(5), "isn't a multiple of 5"),
        ("scheduler/scheduler_config.json", "prediction_type", serde_json::json!("sample"), "sample"),
        ("scheduler/scheduler_config.json", "beta_end", serde_json::json!(-1.0), "betas"),
        (
            "scheduler/scheduler_config.json",
            "num_train_timesteps",
            serde_json::json!(0),
            "num_train_timesteps",
        ),
    ] {
        let config = path.join(file);
        let before = fs::read(&config).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&before).unwrap();
        json[key] = value;
        fs::write(&config, json.to_string()).unwrap();
        let (error, text) = refused(&path, |_| {});
        assert!(matches!(error, Error::Unsupported { .. }) && text.contains(what), "{file} {key}: {text}");
        fs::write(&config, before).unwrap();
    }
    let (_, text) = refused(&path.join("unet"), |_| {});
    assert!(text.contains("a UNet2DConditionModel"), "{text}");
    let (_, text) = refused(&path, |o| o.family = Some(engine::card::Family::Sdxl));
    assert!(text.contains("not Stable Diffusion XL"), "{text}");
    let (_, text) = refused(&path, |o| o.keep = vec!["unet.nothing=f16".into()]);
    assert!(text.contains("fits no matrix"), "{text}");
    let (_, text) = refused(&path, |o| o.vae = Some(path.join("text_encoder/model.safetensors")));
    assert!(text.contains("no VAE"), "{text}");
}
