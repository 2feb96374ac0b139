"""Stable Diffusion models with random weights, and what diffusers makes of them in f32.

    python make_models.py                        the tiny models, beside this file
    python make_models.py --out FOLDER NAME ...  those named; also sd15, sd21, sdxl: of full size, 2 to 7 GB each, for which it
                                                 takes minutes and, for sdxl, 14 GB of memory

writes, for each model, a diffusers folder NAME/ with f16 weights and NAME/golden.safetensors. The tiny networks have every
part that their large relatives have, at widths of 16 to 64; their latents are 9 x 7, so that each change of resolution
meets an odd size. `cargo run --release -p sdfast-tests --example compare -- FOLDER/NAME` compares a model of any size.
Tensors of golden.safetensors (f32, ids int32), the ones that a model has; latents are h x w:

    input_ids, input_ids_2   [2, 77]           of "" and of the metadata's `prompt`, for each tokenizer
    text_embeddings          [2, 77, d]        what the denoiser is conditioned on, both encoders joined
    pooled                   [2, p]            pooled embeddings of the last encoder
    size_ids                 [2, 5 or 6]       size conditioning of a picture of those latents, not cropped, as fed to the denoiser
    latents                  [1, in, h, w]     input of the denoiser
    timestep                 [2]               one for each pass
    guidance_embedding       [1, g]            input of time_embedding.cond_proj, for a guidance scale of 8
    prediction               [2, 4, h, w]      output of the denoiser for each row of text_embeddings at its timestep
    vae_latents              [1, 4, h, w]      input of the decoder (post_quant_conv), scaling already undone
    vae_decoded              [1, 3, 8h, 8w]
    vae_picture              [1, 3, 8h, 8w]    in [-1, 1]
    vae_mean, vae_logvar     [1, 4, h, w]

The tiny models' weights are drawn from normal distributions scaled by the fan-in, norms and biases included, so that a part
left out or taken wrongly shows in the output. Those of full size are as torch and transformers initialize them, but for their
norms, which are drawn too: as in trained networks, a layer adds less to its input than it holds already. (Where each layer
adds as much as it finds, errors of rounding grow with the depth in a way that no trained network shows.) Needs torch,
diffusers, transformers and safetensors.
"""
import argparse
import json
import math
import os
import shutil

import torch
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
PROMPT = "a small red house, 2 trees & the moon"
MERGES = ["t h", "th e</w>", "r e", "re d</w>", "m o", "mo o", "moo n</w>", "a l", "s m", "sm al", "smal l</w>", "h o", "u s", "ho us",
          "hous e</w>", "t r", "tr e", "tre e", "tree s</w>", "i n", "e r</w>", "in g</w>"]
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
                set_alpha_to_one=False, skip_prk_steps=True, trained_betas=None, clip_sample=False, timestep_spacing="leading")
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
CROSS_3 = dict(down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
               up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
# SDXL's order: the first level has no attention.
XL_3 = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8)


def clip(width, layers, heads, act, projection):
    return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act,
                projection_dim=projection, max_position_embeddings=77)


UNET = dict(in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=8)
MODELS = {
    # Two heads at each level: head dims 8, 16 and 24; 1 x 1 convolutions around the transformers.
    "sd15-tiny": dict(pipeline="StableDiffusionPipeline", text=[clip(32, 2, 2, "quick_gelu", 32)], pad=["<|endoftext|>"], scale=0.18215,
                      unet=dict(UNET, block_out_channels=(16, 32, 48), **CROSS_3, cross_attention_dim=32, attention_head_dim=2),
                      vae=dict(block_out_channels=(16, 16, 16, 32))),
    # Head dims of 8 at each level, linear projections, two layers a block (three on the way up), exact GELU, velocity prediction.
    "sd2-tiny": dict(pipeline="StableDiffusionPipeline", text=[clip(64, 2, 4, "gelu", 32)], pad=["!"], scale=0.18215, prediction="v_prediction",
                     unet=dict(UNET, layers_per_block=2, **CROSS_3, cross_attention_dim=64, attention_head_dim=[2, 4, 4],
                               use_linear_projection=True)),
    # Two text encoders, penultimate layers without the final norm, pooled embedding and sizes.
    "sdxl-tiny": dict(pipeline="StableDiffusionXLPipeline", text=[clip(32, 2, 2, "quick_gelu", 32), clip(64, 2, 4, "gelu", 48)],
                      pad=["<|endoftext|>", "!"], scale=0.13025,
                      unet=dict(UNET, **XL_3, cross_attention_dim=96, attention_head_dim=[1, 2, 4], projection_class_embeddings_input_dim=48 + 6 * 8)),
    # The second encoder alone, five size numbers, transformers in the middle of the levels.
    "refiner-tiny": dict(pipeline="StableDiffusionXLImg2ImgPipeline", text=[None, clip(32, 3, 2, "gelu", 48)], pad=[None, "!"], scale=0.13025,
                         unet=dict(UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                                   up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=2,
                                   use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                                   cross_attention_dim=32, attention_head_dim=[2, 2, 4], projection_class_embeddings_input_dim=48 + 5 * 8)),
    # Nine input channels.
    "inpaint-tiny": dict(pipeline="StableDiffusionInpaintPipeline", text=[clip(32, 1, 2, "quick_gelu", 32)], pad=["<|endoftext|>"], scale=0.18215,
                         unet=dict(UNET, in_channels=9, **CROSS_3, cross_attention_dim=32, attention_head_dim=2)),
    # A distilled network without a middle, with a guidance embedding.
    "lcm-tiny": dict(pipeline="LatentConsistencyModelPipeline", text=[clip(32, 1, 2, "quick_gelu", 32)], pad=["<|endoftext|>"], scale=0.18215,
                     unet=dict(UNET, **CROSS_3, cross_attention_dim=32, attention_head_dim=2, mid_block_type=None, time_cond_proj_dim=16)),
}

# The published sizes.
LARGE_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
LARGE = dict(UNET, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, norm_num_groups=32, sample_size=64,
             down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
FULL = {
    "sd15": dict(pipeline="StableDiffusionPipeline", text=[clip(768, 12, 12, "quick_gelu", 768)], pad=["<|endoftext|>"], scale=0.18215,
                 latents=(48, 40), vae=LARGE_VAE, unet=dict(LARGE, cross_attention_dim=768, attention_head_dim=8)),
    "sd21": dict(pipeline="StableDiffusionPipeline", text=[clip(1024, 23, 16, "gelu", 512)], pad=["!"], scale=0.18215, prediction="v_prediction",
                 latents=(48, 40), vae=LARGE_VAE,
                 unet=dict(LARGE, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)),
    "sdxl": dict(pipeline="StableDiffusionXLPipeline", text=[clip(768, 12, 12, "quick_gelu", 768), clip(1280, 32, 20, "gelu", 1280)],
                 pad=["<|endoftext|>", "!"], scale=0.13025, latents=(48, 40), vae=LARGE_VAE,
                 unet=dict(LARGE, **XL_3 | dict(transformer_layers_per_block=[1, 2, 10], addition_time_embed_dim=256),
                           cross_attention_dim=2048, attention_head_dim=[5, 10, 20], projection_class_embeddings_input_dim=1280 + 6 * 256)
                 | dict(block_out_channels=(320, 640, 1280))),
}


def write_tokenizer(folder, pad, full):
    """CLIP's byte-level BPE; for tiny models with a handful of merges: 512 + len(MERGES) + 2 tokens."""
    os.makedirs(folder, exist_ok=True)
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=pad)
    write_json(f"{folder}/special_tokens_map.json", special)
    write_json(f"{folder}/tokenizer_config.json", dict(special, tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True,
                                                        errors="replace", add_prefix_space=False))
    if full:
        for f in ("vocab.json", "merges.txt"):
            shutil.copy(os.path.join(HERE, "..", "..", "models", "demo", "model", "tokenizer", f), folder)
        return 49408
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    chars = [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]
    vocab = chars + [c + "</w>" for c in chars] + [m.replace(" ", "") for m in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    with open(f"{folder}/vocab.json", "w", encoding="utf-8") as f:
        json.dump({t: i for i, t in enumerate(vocab)}, f, ensure_ascii=False)
    with open(f"{folder}/merges.txt", "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return len(vocab)


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


@torch.no_grad()
def build(make, seed, full):
    """What `make` returns, with random weights, all of them exact in f16. Norms are around 1; the rest is scaled by the fan-in
    with small biases, or, where `full`, as initialized."""
    torch.manual_seed(seed)
    module = make()
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if full and not ("norm" in name and p.ndim == 1):
            p.copy_(p.half().float())
            continue
        x = torch.randn(p.shape, generator=g)
        if p.ndim >= 2:
            fan_in = 4 if "embedding.weight" in name else p[0].numel()      # token and position tables: fixed size
            x = x / math.sqrt(fan_in)
        elif "norm" in name and name.endswith("weight"):
            x = 1 + .2 * x
        else:
            x = .1 * x
        p.copy_(x.half().float())
    return module.eval()


def save_part(module, folder):
    """As `save_pretrained` does, in f16, without what is not a setting; the classic key prefix for text encoders."""
    os.makedirs(folder, exist_ok=True)
    config = json.loads(module.config.to_json_string() if hasattr(module.config, "to_json_string") else json.dumps(dict(module.config)))
    for k in ("_name_or_path", "_use_default_values"):
        config.pop(k, None)
    if isinstance(module, (UNet2DConditionModel, AutoencoderKL)):
        config = dict(_class_name=type(module).__name__, **{k: v for k, v in config.items() if not k.startswith("_class")})
        file = "diffusion_pytorch_model.safetensors"
    else:
        config["architectures"] = [type(module).__name__]
        file = "model.safetensors"
    write_json(f"{folder}/config.json", config)
    state = {}
    for k, t in module.state_dict().items():
        if "position_ids" in k:
            continue
        if file == "model.safetensors" and not k.startswith(("text_model.", "text_projection")):
            k = "text_model." + k
        state[k] = t.half().contiguous()
    save_file(state, f"{folder}/{file}", metadata={"format": "pt"})


def text_parts(name, spec, folder, seed):
    """(ids, hidden states of the penultimate or the last layer, pooled) of each encoder."""
    out = []
    for i, (settings, pad) in enumerate(zip(spec["text"], spec["pad"])):
        if settings is None:
            continue
        end = "_2" if i else ""
        vocab = write_tokenizer(f"{folder}/tokenizer{end}", pad, name in FULL)
        tok = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer{end}")
        config = CLIPTextConfig(vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=1, **settings)
        model = build(lambda: (CLIPTextModelWithProjection if i else CLIPTextModel)(config), seed + i, name in FULL)
        save_part(model, f"{folder}/text_encoder{end}")
        ids = torch.tensor(tok(["", PROMPT], padding="max_length", max_length=77, truncation=True)["input_ids"])
        r = model(ids, output_hidden_states=True)
        xl = "XL" in spec["pipeline"]
        out.append((end, ids, r.hidden_states[-2] if xl else r.last_hidden_state, r.text_embeds if i else None))
    return out


@torch.no_grad()
def make(name, spec, out):
    folder = os.path.join(out, name)
    seed = 1000 * (1 + list(MODELS | FULL).index(name))
    h, w = spec.get("latents", (9, 7))
    g = torch.Generator().manual_seed(seed + 9)
    golden = {}
    parts = text_parts(name, spec, folder, seed)
    for end, ids, _, _ in parts:
        golden["input_ids" + end] = ids.int()
    context = torch.cat([h for _, _, h, _ in parts], -1)
    golden["text_embeddings"] = context

    unet = build(lambda: UNet2DConditionModel(**spec["unet"]), seed + 2, name in FULL)
    save_part(unet, f"{folder}/unet")
    x = torch.randn((1, spec["unet"]["in_channels"], h, w), generator=g)
    times, predictions = torch.tensor([981., 261.]), []
    more = {}
    if "addition_embed_type" in spec["unet"]:
        golden["pooled"] = parts[-1][3]
        golden["size_ids"] = torch.tensor([[8. * h, 8. * w, 0., 0.] + ([8. * h, 8. * w] if len(parts) == 2 else [6.])] * 2)
    if spec["unet"].get("time_cond_proj_dim"):
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        golden["guidance_embedding"] = embed(None, torch.tensor([8. - 1]), spec["unet"]["time_cond_proj_dim"])
        more["timestep_cond"] = golden["guidance_embedding"]
    for i in range(2):
        if "pooled" in golden:
            more["added_cond_kwargs"] = dict(text_embeds=golden["pooled"][i:i + 1], time_ids=golden["size_ids"][i:i + 1])
        predictions.append(unet(x, times[i], context[i:i + 1], **more).sample)
    golden |= dict(latents=x, timestep=times, prediction=torch.cat(predictions))
    del unet

    vae = build(lambda: AutoencoderKL(**VAE | spec.get("vae", {}), scaling_factor=spec["scale"], sample_size=64), seed + 3, name in FULL)
    save_part(vae, f"{folder}/vae")
    z = 2 * torch.randn((1, 4, h, w), generator=g)
    picture = (torch.rand((1, 3, 8 * h, 8 * w), generator=g) * 2 - 1).half().float()
    d = vae.encode(picture).latent_dist
    golden |= dict(vae_latents=z, vae_decoded=vae.decode(z).sample, vae_picture=picture, vae_mean=d.mean, vae_logvar=d.logvar)

    os.makedirs(f"{folder}/scheduler", exist_ok=True)
    write_json(f"{folder}/scheduler/scheduler_config.json", dict(_class_name="DDIMScheduler", prediction_type=spec.get("prediction", "epsilon"), **SCHEDULE))
    index = dict(_class_name=spec["pipeline"], scheduler=["diffusers", "DDIMScheduler"], unet=["diffusers", "UNet2DConditionModel"],
                 vae=["diffusers", "AutoencoderKL"])
    for i, settings in enumerate(spec["text"]):
        end, cls = ("_2", "CLIPTextModelWithProjection") if i else ("", "CLIPTextModel")
        index["text_encoder" + end] = [None, None] if settings is None else ["transformers", cls]
        index["tokenizer" + end] = [None, None] if settings is None else ["transformers", "CLIPTokenizer"]
    if "XL" in spec["pipeline"]:
        index["force_zeros_for_empty_prompt"] = len(parts) == 2
    write_json(f"{folder}/model_index.json", index)

    golden = {k: v.contiguous() for k, v in golden.items()}
    save_file(golden, f"{folder}/golden.safetensors", metadata={"prompt": PROMPT})
    for k, v in golden.items():
        print(f"{name:13} {k:20} {str(tuple(v.shape)):18} rms {v.float().pow(2).mean().sqrt():.4f}")
    print(f"{name:13} {sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(folder) for f in fs) / 1e6:.2f} MB")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("names", nargs="*", default=list(MODELS))
    p.add_argument("--out", default=HERE)
    a = p.parse_args()
    for n in a.names:
        make(n, (MODELS | FULL)[n], a.out)
