"""Times OpenVINO, as torch_peer.py does torch.

    python openvino_peer.py prepare MODEL SIZE       makes MODEL/openvino/{unet,unet_int8,vae}-SIZE.xml, once
    python openvino_peer.py MODEL SIZE THREADS STEPS int8-bf16|int8-f32|bf16|f32

int8 is post-training quantization of weights and activations (nncf, two random samples, without the slow corrections of
accuracy: they don't change the speed); what follows the dash is the type of everything else.
"""
import json
import os
import sys

import numpy as np
import openvino as ov

import peer


def paths(folder, size):
    return {name: f"{folder}/openvino/{name}-{size}.xml" for name in ("unet", "unet_int8", "vae")}


def samples(config, size):
    """Inputs of one pass, in the order of the converted model's."""
    random = np.random.default_rng(0)
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in peer.shapes(config, size).items()}
    made["timestep"] = np.float32(981)
    return made


def prepare(folder, size):
    import nncf
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    files = paths(folder, size)
    os.makedirs(f"{folder}/openvino", exist_ok=True)

    class Unet(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states, time_ids=None, text_embeds=None):
            more = None if time_ids is None else {"time_ids": time_ids, "text_embeds": text_embeds}
            return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=more, return_dict=False)[0]

    class Decoder(torch.nn.Module):
        def __init__(self, vae):
            super().__init__()
            self.vae = vae

        def forward(self, latents):
            return self.vae.decode(latents, return_dict=False)[0]

    def convert(module, inputs, path):
        with torch.inference_mode():
            model = ov.convert_model(module.eval(), example_input=inputs, input=[list(x.shape) for x in inputs.values()])
        ov.save_model(model, path, compress_to_fp16=True)

    unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=torch.float32)
    made = samples(unet.config, size)
    if not os.path.exists(files["unet"]):
        convert(Unet(unet), {name: torch.tensor(x) for name, x in made.items()}, files["unet"])
    del unet
    if not os.path.exists(files["vae"]):
        vae = AutoencoderKL.from_pretrained(f"{folder}/vae", torch_dtype=torch.float32)
        convert(Decoder(vae), {"latents": torch.randn(1, 4, size // 8, size // 8)}, files["vae"])
    if not os.path.exists(files["unet_int8"]):
        quick = nncf.AdvancedQuantizationParameters(disable_bias_correction=True, smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(-1, -1))
        model = nncf.quantize(ov.Core().read_model(files["unet"]), nncf.Dataset([list(made.values())] * 2), subset_size=2,
                              model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED, advanced_parameters=quick)
        ov.save_model(model, files["unet_int8"])


def main():
    if sys.argv[1] == "prepare":
        return prepare(sys.argv[2], int(sys.argv[3]))
    folder, size, threads, steps, kind = peer.arguments()
    files = paths(folder, size)
    core = ov.Core()
    floats = kind.split("-")[-1]

    def compiled(path):
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": floats, "PERFORMANCE_HINT": "LATENCY"}
        return core.compile_model(path, "CPU", settings).create_infer_request()

    with open(f"{folder}/unet/config.json") as f:
        config = {"addition_embed_type": None, **json.load(f)}
    unet = compiled(files["unet_int8" if kind.startswith("int8") else "unet"])
    inputs = list(samples(config, size).values())
    step = peer.time(lambda: unet.infer(inputs), steps)
    del unet
    vae = compiled(files["vae"])
    latents = np.random.default_rng(1).standard_normal((1, 4, size // 8, size // 8)).astype(np.float32)
    decode = peer.time(lambda: vae.infer([latents]), max(1, steps - 1))
    peer.done(step, decode)


if __name__ == "__main__":
    sys.exit(main())
