"""TAESD (AutoencoderTiny) with random weights, and what diffusers makes with it in f32.

    python make_tiny_vae.py                  taesd-tiny/, beside this file: 16 channels, another number of blocks at each level
    python make_tiny_vae.py --out FOLDER     FOLDER/taesd/, of the published size, without golden numbers
    python make_tiny_vae.py --time           decodes 512x512 with the published size in bf16 and prints the best of ten times

writes a diffusers folder with f16 weights and, in it, golden.safetensors (f32):

    latents    [1, 4, 9, 7]     input of the decoder, some beyond the 3 that it bounds them to
    decoded    [1, 3, 72, 56]
    picture    [1, 3, 72, 56]   in [-1, 1]
    encoded    [1, 4, 9, 7]

Needs torch, diffusers and safetensors.
"""
import argparse
import os
import time

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, num_encoder_blocks=(1, 2, 3, 1), num_decoder_blocks=(2, 1, 3, 1))


@torch.no_grad()
def build(**config):
    """Weights are scaled so that values neither die nor grow, all of them exact in f16."""
    torch.manual_seed(1)
    vae = AutoencoderTiny(**config).eval()
    for name, p in vae.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.1)
        else:
            p.normal_(std=(2 / p[0].numel()) ** 0.5 * (0.5 if ".4." in name else 1))
    return vae.half().float()


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out")
    p.add_argument("--time", action="store_true")
    a = p.parse_args()
    if a.time:
        vae = build().to(torch.bfloat16, memory_format=torch.channels_last)
        latents = torch.randn(1, 4, 64, 64).to(torch.bfloat16, memory_format=torch.channels_last)
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            vae.decode(latents)
            seconds.append(time.perf_counter() - start)
        print(f"torch bf16, {torch.get_num_threads()} threads: {min(seconds):.3f} s")
        return
    vae = build(**({} if a.out else TINY))
    folder = os.path.join(a.out, "taesd") if a.out else os.path.join(HERE, "taesd-tiny")
    vae.half().save_pretrained(folder)
    if not a.out:
        vae.float()
        latents, picture = torch.randn(1, 4, 9, 7) * 2, torch.rand(1, 3, 72, 56) * 2 - 1
        decoded, encoded = vae.decode(latents).sample, vae.encode(picture).latents
        print(f"rms: decoded {decoded.pow(2).mean().sqrt():.3f}, encoded {encoded.pow(2).mean().sqrt():.3f}")
        golden = dict(latents=latents, decoded=decoded, picture=picture, encoded=encoded)
        save_file({k: v.contiguous() for k, v in golden.items()}, os.path.join(folder, "golden.safetensors"))


if __name__ == "__main__":
    main()
