"""How the time of a step grows with the picture's size and with threads: a table, and a plot as SVG.

    python scaling.py MODEL.sdq [--sizes 256,384,512,768,1024] [--threads 1,2] [--rounds N] [--program SDFAST] [--prefix COMMAND]
                      [--svg FILE] [--page FILE.md]

A step is both guidance passes; the best of all rounds counts. --page puts the table between `<!-- scaling -->` and
`<!-- end of scaling -->` of that page, in place of what stands there.
"""
import argparse
import json
import os
import shlex
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))
COLORS = ["#1f6f8b", "#e07a1f", "#5a8f29", "#8a4f9e"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]
    p.add_argument("model")
    p.add_argument("--sizes", type=numbers, default=[256, 384, 512, 768, 1024])
    p.add_argument("--threads", type=numbers, default=[1, 2])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--program", default=os.path.join(HERE, "..", "..", "target", "release", "sdfast"))
    p.add_argument("--prefix", default="")
    p.add_argument("--svg")
    p.add_argument("--page")
    return p.parse_args()


def measure(a, size, threads):
    command = [*shlex.split(a.prefix), a.program, "bench", "model", "-m", a.model, "-W", str(size), "-H", str(size),
               "--threads", str(threads), "--steps", "3", "--json"]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return min(told["timings"]["steps_s"]), told["timings"]["vae_s"], told["memory"]["measured_peak_bytes"]


def plot(a, steps):
    """Both axes from zero; pixels across, seconds up."""
    width, height, left, bottom = 640, 400, 60, 50
    most = max(steps.values())
    x = lambda size: left + (width - left - 20) * size**2 / max(a.sizes)**2
    y = lambda s: height - bottom - (height - bottom - 30) * s / most
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<path d="M{left},20V{height - bottom}H{width - 20}" fill="none" stroke="#444"/>',
           f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">picture (axis: pixels)</text>',
           f'<text x="16" y="{height / 2}" text-anchor="middle" transform="rotate(-90 16 {height / 2})">seconds a step</text>']
    for size in a.sizes:
        out.append(f'<text x="{x(size):.0f}" y="{height - bottom + 18}" text-anchor="middle">{size}²</text>')
    for i in range(5):
        s = most * i / 4
        out.append(f'<text x="{left - 6}" y="{y(s) + 4:.0f}" text-anchor="end">{s:.1f}</text>')
    for color, threads in zip(COLORS * len(a.threads), a.threads):
        points = [(x(size), y(steps[size, threads])) for size in a.sizes]
        out.append(f'<polyline points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{color}"/>' for px, py in points]
        px, py = points[-1]
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        out.append(f'<text x="{px - 8:.0f}" y="{py - 8:.0f}" text-anchor="end" fill="{color}">{label}</text>')
    return "\n".join([*out, "</svg>", ""])


def main():
    a = arguments()
    steps, rest = {}, {}
    for _ in range(a.rounds):
        for size in a.sizes:
            for threads in a.threads:
                step, vae, peak = measure(a, size, threads)
                key = size, threads
                steps[key] = min(step, steps.get(key, step))
                before = rest.get(key, (vae, 0))
                rest[key] = min(vae, before[0]), max(peak, before[1])
    heads = [f"step, {t} thread{'s' if t > 1 else ''}" for t in a.threads]
    most = max(a.threads)
    rows = [f"| picture | {' | '.join(heads)} | VAE, {most} threads | peak |", f"|---|{'--:|' * (len(heads) + 2)}"]
    for size in a.sizes:
        vae, peak = rest[size, most]
        rows.append(f"| {size} x {size} | {' | '.join(f'{steps[size, t]:.2f} s' for t in a.threads)} | {vae:.2f} s | {peak / 2**20:.0f} MiB |")
    table = "\n".join(rows)
    print(table)
    if a.page:
        with open(a.page) as f:
            before, rest_of_page = f.read().split("<!-- scaling -->")
        _, after = rest_of_page.split("<!-- end of scaling -->")
        with open(a.page, "w") as f:
            f.write(f"{before}<!-- scaling -->\n{table}\n<!-- end of scaling -->{after}")
    if a.svg:
        with open(a.svg, "w") as f:
            f.write(plot(a, steps))


if __name__ == "__main__":
    main()
