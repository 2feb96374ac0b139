"""One pass of diffusers' UNet in f32 for the miniature of every model that `sdconv synthetic` knows.

    python make_variants.py SDCONV       SDCONV is the program's path; writes variants.safetensors beside this file

variants.safetensors holds, for each model, the tensor NAME [2, 4, 9, 7]: predictions for two texts at timesteps 981 and 261.
Weights, latents, texts and pooled embeddings are made by formula, here and in `convert::synthetic::random`: SplitMix64
started from a hash of the seed and the tensor's name, four 16-bit numbers summed for each value. Latents [1, in, 9, 7],
texts [2, 77, d] and pooled embeddings [2, p] are those of seed 1 for the names `latents`, `texts` and `pooled`. Sizes are
those of a picture of 72 x 56 that isn't cropped, the refiner's score is 6, the guidance scale of LCM is 8.
Needs torch, diffusers and safetensors.
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = ["sd15", "sd15-inpaint", "sd15-edit", "sd15-lcm", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "sd2", "sd2-v", "sd2-inpaint",
          "sd2-edit", "sdxl", "sdxl-v", "sdxl-inpaint", "sdxl-edit", "sdxl-refiner", "cosxl", "cosxl-edit", "playground-2.5", "ssd-1b", "vega"]
H, W = 9, 7


def normal(name, *shape, seed=1):
    mask = (1 << 64) - 1
    state = seed ^ 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 & mask
    n = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    total = sum((z >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4))
    x = (total.astype(np.float32) - np.float32(131070.0)) * np.float32(1.0 / 37837.227)
    return torch.from_numpy(x.reshape(shape))


@torch.no_grad()
def predict(folder):
    unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=torch.float32).eval()
    cfg = unet.config
    latents = normal("latents", 1, cfg.in_channels, H, W)
    texts = normal("texts", 2, 77, cfg.cross_attention_dim)
    more = {}
    if cfg.time_cond_proj_dim:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        more["timestep_cond"] = embed(None, torch.tensor([8. - 1]), cfg.time_cond_proj_dim)
    out = []
    for i, t in enumerate([981., 261.]):
        if cfg.addition_embed_type:
            pooled = normal("pooled", 2, 64)[i:i + 1]
            count = (cfg.projection_class_embeddings_input_dim - 64) // cfg.addition_time_embed_dim
            sizes = [8. * H, 8. * W, 0., 0.] + ([8. * H, 8. * W] if count == 6 else [6.])
            more["added_cond_kwargs"] = dict(text_embeds=pooled, time_ids=torch.tensor([sizes]))
        out.append(unet(latents, torch.tensor(t), texts[i:i + 1], **more).sample)
    return torch.cat(out).contiguous()


if __name__ == "__main__":
    golden = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = os.path.join(temporary, name)
            subprocess.run([sys.argv[1], "synthetic", f"tiny-{name}", "--layout", "diffusers", "-o", folder], check=True, stdout=subprocess.DEVNULL)
            golden[name] = predict(folder)
        print(f"{name:16} rms {golden[name].pow(2).mean().sqrt():.4f}")
    save_file(golden, os.path.join(HERE, "variants.safetensors"))
