"""Times stable-diffusion.cpp (the PyPI package stable-diffusion-cpp-python), as torch_peer.py does torch.

    python sdcpp_peer.py MODEL SIZE THREADS STEPS q8_0|q4_0|f16

MODEL is one .safetensors file. It makes whole pictures: a step is what lies between two calls of its progress function,
the VAE what follows the last one.
"""
import sys
import time

from stable_diffusion_cpp import StableDiffusion

import peer


def main():
    file, size, threads, steps, kind = peer.arguments()
    model = StableDiffusion(model_path=file, wtype=kind, n_threads=threads)
    marks = []
    model.generate_image(prompt="a house", cfg_scale=7.5, width=size, height=size, sample_steps=steps + 1,
                         progress_callback=lambda step, total, seconds: marks.append((step, time.perf_counter())))
    end = time.perf_counter()
    marks = marks[-(steps + 1):]
    peer.done([b - a for (_, a), (_, b) in zip(marks, marks[1:])], [end - marks[-1][1]])


if __name__ == "__main__":
    sys.exit(main())
