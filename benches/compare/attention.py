"""Attention of sdfast beside torch's scaled_dot_product_attention in bf16, in turns: milliseconds of the best call.

    python attention.py [--threads N] [--rounds N] [--seconds N]

Shapes are those of SD 1.5 at 512 x 512 with both guidance passes. sdfast's figures come from `cargo bench --bench attention`,
of the products that `--precision fast` takes.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
# Batch, queries, keys, heads, head size.
SHAPES = [(2, 4096, 4096, 8, 40), (2, 1024, 1024, 8, 80), (2, 256, 256, 8, 160), (2, 4096, 77, 8, 40), (2, 1024, 77, 8, 80)]


def of_sdfast(a, name):
    """The best call of the bench called `name`."""
    bench = ["cargo", "bench", "-q", "-p", "sdfast-benches", "--bench", "attention", "--"]
    times = ["--warm-up-time", "0.5", "--measurement-time", str(a.seconds), "--noplot"]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "CRITERION_HOME": folder}
        run = subprocess.run([*bench, *times, f"int8/{name}$"], cwd=ROOT, env=env, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"the bench failed:\n{run.stderr}")
        with open(os.path.join(folder, "attention", "int8", name, "new", "sample.json")) as f:
            sample = json.load(f)
    return min(t / n for t, n in zip(sample["times"], sample["iters"])) * 1e-9


def of_torch(a, q, k, v):
    start, best = time.perf_counter(), float("inf")
    with torch.no_grad():
        while time.perf_counter() - start < a.seconds:
            clock = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            best = min(best, time.perf_counter() - clock)
    return best


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=2)
    a = p.parse_args()
    # The bench takes as many threads as it may have processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    torch.set_num_threads(a.threads)
    print(f"{a.threads} threads, the best of {a.rounds} rounds\n")
    print("| attention | sdfast | torch bf16 | torch's time to sdfast's |\n|---|--:|--:|--:|")
    for batch, nq, nk, heads, d in SHAPES:
        q, k, v = (torch.randn(batch, heads, n, d, dtype=torch.bfloat16) for n in (nq, nk, nk))
        name = f"{batch}x{heads}x{nq}x{nk}x{d}"
        own = peer = float("inf")
        for _ in range(a.rounds):
            own, peer = min(own, of_sdfast(a, name)), min(peer, of_torch(a, q, k, v))
        print(f"| {nq} x {nk}, {batch} x {heads} heads of {d} | {own * 1e3:.2f} ms | {peer * 1e3:.2f} ms | {peer / own:.2f} |", flush=True)


if __name__ == "__main__":
    main()
