"""Times torch and diffusers: one sampler step of the denoiser (both guidance passes in one batch), then the VAE's decoder.

    python torch_peer.py MODEL SIZE THREADS STEPS bf16|f32

MODEL is a folder in diffusers' layout. Prints one JSON object: seconds of each step, of each decoding, peak bytes.
"""
import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import peer


@torch.inference_mode()
def main():
    folder, size, threads, steps, kind = peer.arguments()
    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[kind]

    def load(part, name):
        model = part.from_pretrained(f"{folder}/{name}", torch_dtype=dtype).eval()
        return model.to(memory_format=torch.channels_last)

    unet = load(UNet2DConditionModel, "unet")
    inputs = {name: torch.randn(shape, dtype=dtype) if name != "timestep" else torch.tensor(981)
              for name, shape in peer.shapes(unet.config, size).items()}
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    more = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    step = peer.time(lambda: unet(**inputs, added_cond_kwargs=more or None), steps)
    del unet
    vae = load(AutoencoderKL, "vae")
    latents = torch.randn(1, 4, size // 8, size // 8, dtype=dtype).to(memory_format=torch.channels_last)
    decode = peer.time(lambda: vae.decode(latents), max(1, steps - 1))
    peer.done(step, decode)


if __name__ == "__main__":
    sys.exit(main())
