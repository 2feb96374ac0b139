//! Files that hold weights but no whole model, and models of other families: named, with what to do.
#![forbid(unsafe_code)]

use super::names::Named;
use crate::error::Error;
use crate::source::Source;

/// Parts of names that tell a family that can't be converted.
const FAMILIES: [(&str, &str); 13] = [
    ("double_stream_modulation_img.lin.weight", "FLUX.2"),
    ("distilled_guidance_layer.in_proj.bias", "Chroma"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX.1"),
    ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "Stable Diffusion 3"),
    ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ("cap_embedder.0.weight", "Z-Image"),
    ("head.modulation", "Wan"),
    ("input_blocks.8.0.time_mixer.mix_factor", "Stable Video Diffusion"),
    ("effnet_mapper.0.weight", "Stable Cascade"),
    ("t_block.1.weight", "PixArt"),
    ("mlp_t5.0.weight", "Hunyuan-DiT"),
    ("label_emb.weight", "Stable Diffusion upscaler"),
    ("noise_augmentor.data_mean", "Stable Diffusion unCLIP"),
];

/// Parts of names that tell a file that goes beside a model.
const BESIDE: [(&str, &str, &str); 32] = [
    (".lora_down.", "a LoRA", USE),
    (".lora_up.", "a LoRA", USE),
    (".lora_A.", "a LoRA", USE),
    (".lora.down.", "a LoRA", USE),
    ("_lora.down.", "a LoRA", USE),
    (".lora_linear_layer.", "a LoRA", USE),
    (".hada_w1", "a LoRA (LoHa)", USE),
    (".lokr_w1", "a LoRA (LoKr)", USE),
    ("lora_unet_", "a LoRA", USE),
    ("lora_te", "a LoRA", USE),
    (".oft_", "a LoRA (OFT)", USE),
    ("control_model.", "a ControlNet", USE),
    ("controlnet_", "a ControlNet", USE),
    ("input_hint_block.", "a ControlNet", USE),
    ("ip_adapter.", "an IP-Adapter", USE),
    ("image_proj.", "an IP-Adapter", USE),
    ("adapter.body.", "a T2I-Adapter", USE),
    ("body.0.block1.", "a T2I-Adapter", USE),
    ("body.0.in_conv.", "a T2I-Adapter", USE),
    ("position_net.", "a GLIGEN adapter", USE),
    ("vision_model.", "an image encoder (CLIP)", USE),
    ("visual.conv1.", "an image encoder (CLIP)", USE),
    ("concept_embeds", "a safety checker", "convert the model it goes with; no safety checker is needed"),
    ("taesd_decoder.", "a part of a tiny VAE (TAESD)", COMPLETE),
    ("decoder.layers.", "a part of a tiny VAE (TAESD)", COMPLETE),
    ("string_to_param", "an embedding (textual inversion)", USE),
    ("emb_params", "an embedding (textual inversion)", USE),
    ("motion_modules.", "a motion module", USE),
    ("hypernet", "a hypernetwork", USE),
    ("conv_first.", "an upscaler", USE),
    ("RRDB", "an upscaler", USE),
    ("model.1.sub.0.RDB", "an upscaler", USE),
];
const COMPLETE: &str = "is the download complete?";
const USE: &str = "convert the model it goes with; such files are used beside a model";

/// Whether it is a whole model; if not, what it is.
pub(super) fn check(source: &Source, named: &Named) -> Result<(), Error> {
    let path = || source.path.clone();
    let names = || source.tensors.keys();
    let kind =
        |what: &str, hint: &str| Err(Error::Kind { path: path(), what: what.into(), hint: hint.into() });
    if source.tensors.is_empty() {
        return Err(Error::NotACheckpoint { path: path(), why: "it has no tensors".into() });
    }
    let has = |part: &str| named.tensors.keys().any(|name| name.starts_with(part));
    if let Some((_, family)) = FAMILIES.iter().find(|(key, _)| names().any(|n| n.ends_with(key))) {
        return Err(Error::Unsupported { path: path(), what: format!("it is a {family} model") });
    }
    let unet = has("unet.conv_in.") && has("unet.down_blocks.0.");
    if named.bare_unet || !unet {
        // The order of the table matters, not that of the names.
        let known = BESIDE.iter().find(|(key, ..)| names().any(|n| n.contains(key)));
        if let Some((_, what, hint)) = known {
            return kind(what, hint);
        }
        if is_embedding(source) {
            return kind("an embedding (textual inversion)", USE);
        }
    }
    if !unet {
        if has("vae.")
            || named.strangers.iter().any(|n| n.starts_with("decoder.") || n.starts_with("encoder.conv_in."))
        {
            return kind("a VAE alone", "convert the model it goes with, and give this file with --vae");
        }
        let text = ["text_model.", "transformer.resblocks.", "encoder.block.", "encoder.layers."];
        if has("text_encoder") || names().any(|n| text.iter().any(|t| n.starts_with(t))) {
            return kind("a text encoder alone", "convert a whole checkpoint, one with a UNet and a VAE");
        }
        let some: Vec<&str> = names().take(3).map(String::as_str).collect();
        let why = format!("its tensors ({}, ...) belong to no network that is known", some.join(", "));
        return Err(Error::NotACheckpoint { path: path(), why });
    }
    let absent: Vec<&str> = [("text_encoder.", "a text encoder"), ("vae.", "a VAE")]
        .into_iter()
        .filter(|(part, _)| !has(part))
        .map(|(_, what)| what)
        .collect();
    match absent.as_slice() {
        [] => Ok(()),
        absent if named.bare_unet || absent.len() == 2 => {
            kind("a UNet alone", &format!("it lacks {}; convert a whole checkpoint", absent.join(" and ")))
        }
        absent => kind(
            "a model without a part",
            &format!("it lacks {}; convert a whole checkpoint", absent.join(" and ")),
        ),
    }
}

/// A few rows as wide as a text encoder, under the name of a token or an encoder.
fn is_embedding(source: &Source) -> bool {
    source.tensors.len() <= 4
        && source.tensors.iter().all(|(name, tensor)| {
            let wide = tensor.shape.last().is_some_and(|width| [768, 1024, 1280, 4096].contains(width));
            !name.contains('.') && tensor.shape.len() <= 2 && wide
        })
}
