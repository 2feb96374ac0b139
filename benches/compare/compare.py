"""One table of seconds per step, seconds of the VAE and peak memory: sdfast beside torch, OpenVINO and stable-diffusion.cpp.

    python compare.py [--family sd15|sdxl] [--size N] [--threads N] [--tiers amx,avx2,...] [--tools sdfast,torch,openvino,sdcpp]
                      [--rounds N] [--steps N] [--folder FOLDER] [--programs FOLDER] [--prefix COMMAND] [--json FILE]

Everything runs the same random model of the family's full size (`sdconv synthetic`), kept in FOLDER. Programs take turns, so
that a slow minute of the machine meets all of them; of each the best and the median step over all rounds is shown. A step is
both guidance passes. See README.md beside this file.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# The tier's name here, what oneDNN (torch and OpenVINO use it) calls it, and the types that are fast on it.
TIERS = {
    "amx": ("DEFAULT", "bf16"),
    "avx512vnni": ("AVX512_CORE_VNNI", "f32"),
    "avxvnni": ("AVX2_VNNI", "f32"),
    "avx2": ("AVX2", "f32"),
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--family", default="sd15")
    p.add_argument("--size", type=int)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--tiers", default=",".join(TIERS))
    p.add_argument("--tools", default="sdfast,torch,openvino")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--folder", default=os.path.expanduser("~/.cache/sdfast/compare"))
    p.add_argument("--programs", default=os.path.join(HERE, "..", "..", "target", "release"))
    p.add_argument("--prefix", default="", help="put before each measured command, as 'nice -n -20'")
    p.add_argument("--json", help="also write every figure there")
    a = p.parse_args()
    a.size = a.size or (1024 if a.family == "sdxl" else 512)
    unknown = set(a.tiers.split(",")) - set(TIERS)
    if unknown:
        p.error(f"no such tier: {', '.join(sorted(unknown))}; there are {', '.join(TIERS)}")
    return a


def made(path, command):
    """Makes `path` by `command`, once."""
    if not os.path.exists(path):
        print("making", path, file=sys.stderr)
        subprocess.run(command, check=True, stdout=sys.stderr)
    return path


def jobs(a):
    """(tier, name, command, environment) of everything to be measured, models made."""
    sdconv, sdfast = (os.path.join(a.programs, name) for name in ("sdconv", "sdfast"))
    os.makedirs(a.folder, exist_ok=True)
    base = os.path.join(a.folder, a.family)
    folder = made(base, [sdconv, "synthetic", a.family, "--layout", "diffusers", "-o", base])
    tools = a.tools.split(",")
    sizes = [str(a.size), str(a.threads), str(a.steps)]
    python = [sys.executable, "-W", "ignore"]
    out = []
    if "openvino" in tools:
        made(f"{folder}/openvino/unet_int8-{a.size}.xml", [*python, f"{HERE}/openvino_peer.py", "prepare", folder, str(a.size)])
    for tier in a.tiers.split(","):
        onednn, floats = TIERS[tier]
        env = {} if onednn == "DEFAULT" else {"ONEDNN_MAX_CPU_ISA": onednn, "DNNL_MAX_CPU_ISA": onednn}
        if tier in ("avx2", "avxvnni"):
            env["ATEN_CPU_CAPABILITY"] = "avx2"
        if "sdfast" in tools:
            for quant in ("q8", "q4"):
                file = made(f"{base}.{quant}.sdq", [sdconv, folder, "--quant", quant, "-o", f"{base}.{quant}.sdq"])
                size = ["-W", str(a.size), "-H", str(a.size), "--threads", str(a.threads)]
                command = [sdfast, "gen", "x", "-m", file, "--isa", tier, "--steps", str(a.steps + 1), *size,
                           "--json", "-q", "-o", os.path.join(a.folder, "picture.png")]
                out.append((tier, f"sdfast {quant}", command, {}))
        if "torch" in tools:
            out.append((tier, f"torch {floats}", [*python, f"{HERE}/torch_peer.py", folder, *sizes, floats], env))
        if "openvino" in tools:
            for kind in (f"int8-{floats}", floats):
                out.append((tier, f"OpenVINO {kind}", [*python, f"{HERE}/openvino_peer.py", folder, *sizes, kind], env))
    if "sdcpp" in tools:
        # It chooses its instructions when it is built.
        file = made(f"{base}.safetensors", [sdconv, "synthetic", a.family, "-o", f"{base}.safetensors"])
        for kind in ("q8_0", "f16"):
            command = [*python, f"{HERE}/sdcpp_peer.py", file, *sizes, kind]
            out.append(("as built", f"stable-diffusion.cpp {kind}", command, {}))
    return out


def measure(a, command, env):
    run = subprocess.run([*shlex.split(a.prefix), *command], env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"failed: {shlex.join(command)}")
    told = json.loads(run.stdout[run.stdout.index("{"):])
    if "timings" in told:
        # The first step also reads the file and computes what stays for the rest.
        told = {"steps_s": told["timings"]["steps_s"][1:], "vae_s": [told["timings"]["vae_s"]],
                "peak_bytes": told["memory"]["measured_peak_bytes"]}
    return told


def main():
    a = arguments()
    todo = jobs(a)
    results = [{"tier": tier, "tool": name, "steps_s": [], "vae_s": [], "peak_bytes": 0} for tier, name, _, _ in todo]
    for round in range(a.rounds):
        for result, (tier, name, command, env) in zip(results, todo):
            told = measure(a, command, env)
            result["steps_s"] += told["steps_s"]
            result["vae_s"] += told["vae_s"]
            result["peak_bytes"] = max(result["peak_bytes"], told["peak_bytes"])
            print(f"round {round + 1}: {tier}, {name}: {min(told['steps_s']):.2f} s a step, VAE {min(told['vae_s']):.2f} s", file=sys.stderr)
    print(f"{a.family}, {a.size} x {a.size}, {a.threads} threads, both guidance passes, {a.rounds} rounds of {a.steps} steps\n")
    print("| tier | program | step, best | median | sdfast q8's step to it (best, median) | VAE, best | peak |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for r in results:
        own = next((o for o in results if o["tier"] == r["tier"] and o["tool"] == "sdfast q8"), None)
        ratio = ""
        if own and own is not r:
            ratio = " ".join(f"{f(own['steps_s']) / f(r['steps_s']):.2f}" for f in (min, statistics.median))
        print(f"| {r['tier']} | {r['tool']} | {min(r['steps_s']):.2f} s | {statistics.median(r['steps_s']):.2f} s | {ratio} "
              f"| {min(r['vae_s']):.2f} s | {r['peak_bytes'] / 2**20:.0f} MiB |")
    if a.json:
        with open(a.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
