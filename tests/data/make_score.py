"""What the prompt score compares pictures with: score.json, from the demo model's scenes.py and score.py.

`colors` are the twelve named colours, `outlines` the eight shapes drawn in 24 x 24 (one string per row, two hexadecimal
digits per pixel), as score.py makes them.
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "models", "demo"))
import scenes  # noqa: E402
import score  # noqa: E402

outlines = {k: ["".join("%02x" % round(v * 255) for v in row) for row in t] for k, t in score.TEMPLATES.items()}
with open(os.path.join(HERE, "score.json"), "w") as f:
    json.dump({"colors": scenes.COLORS, "outlines": outlines}, f, indent=1)
    f.write("\n")
