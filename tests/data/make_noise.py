"""torch's CPU noise: noise.safetensors holds `torch.randn` of fresh generators, f32, named "<seed> <shape>".

The shapes are a picture's latents, a length that leaves a remainder of 16, lengths below 16 (another algorithm), and two
calls on one generator.
"""
import os

import torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
out = {}
for seed in (0, 42, 2**32 + 5):
    for shape in ((1, 4, 16, 16), (1, 4, 9, 7), (5,), (15,)):
        out[f"{seed} {'x'.join(map(str, shape))}"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
g = torch.Generator().manual_seed(7)
out["7 first 4x5"] = torch.randn((4, 5), generator=g)
out["7 second 3"] = torch.randn((3,), generator=g)
out["7 third 4"] = torch.randn((4,), generator=g)
out["7 fourth 17"] = torch.randn((17,), generator=g)
save_file(out, os.path.join(HERE, "noise.safetensors"))
