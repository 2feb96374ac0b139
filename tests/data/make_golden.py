"""Golden numbers for the engine's noise, schedules and samplers, from torch and diffusers; token ids from transformers.

  python make_golden.py            writes noise.json, schedules.json and tokens.json beside this file

noise.json: {"torch": [{"seed", "calls": [[numbers of one randn] ...]}], "sum": {"seed", "shape", "sum", "first"}}
schedules.json: a list of {"config", "sampler", "spread", "steps", "timesteps", "init_noise_sigma", "latents" (after every evaluation)}.
  Latents start from randn(8) of seed 1 times init_noise_sigma; the model output of an evaluation is half the scaled input plus
  randn(8) of one generator of seed 2; a sampler's own noise comes from one generator of seed 3.
tokens.json: a list of {"text", "repeat", "ids"}: the ids of the text repeated so often, without begin, end, padding.
"""
import inspect
import json
import os
import warnings

import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler,
                       EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler)
from transformers import CLIPTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
warnings.filterwarnings("ignore")


def write(name, value):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as f:
        rows = value if isinstance(value, list) else [value]
        f.write("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def noise():
    runs = []
    for seed, sizes in [(0, [5]), (0, [16, 16]), (0, [20]), (42, [8]), (42, [3, 4, 17, 2, 33]), (2**32 + 7, [16]),
                        (7, [15, 16, 15, 31, 1000])]:
        g = torch.Generator("cpu").manual_seed(seed)
        runs.append({"seed": seed, "calls": [torch.randn(n, generator=g).tolist() for n in sizes]})
    g = torch.Generator("cpu").manual_seed(42)
    x = torch.randn(1, 4, 64, 64, generator=g)
    runs.append({"seed": 42, "large": list(x.shape), "first": x.flatten()[:8].tolist(), "last": x.flatten()[-8:].tolist(),
                 "sum": x.double().sum().item(), "abs_sum": x.double().abs().sum().item()})
    write("noise.json", runs)


def card(config):
    """The schedule of a model card: what engine::card::ScheduleConfig reads."""
    rest = {k: v for k, v in config.items() if k not in ("prediction_type", "edm")}
    if "edm" in config:
        rest["edm"] = config["edm"]
    return {**rest, "prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[config["prediction_type"]]}


def schedules():
    samplers = {
        "ddim": (DDIMScheduler, {"clip_sample": False}, "model"),
        "euler": (EulerDiscreteScheduler, {}, "model"),
        "euler_a": (EulerAncestralDiscreteScheduler, {}, "model"),
        "heun": (HeunDiscreteScheduler, {}, "model"),
        "dpmpp_2m": (DPMSolverMultistepScheduler, {}, "model"),
        "dpmpp_2m karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "karras"),
        "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "model"),
        "lcm": (LCMScheduler, {}, "model"),
    }
    base = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                set_alpha_to_one=False, prediction_type="epsilon", timestep_spacing="leading", rescale_betas_zero_snr=False)
    changes = [{}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True, "steps_offset": 0},
               {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, {"prediction_type": "v_prediction"},
               {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}]
    rows = []
    for name, (make, more_config, spread) in samplers.items():
        known = inspect.signature(make.__init__).parameters
        for change in changes[:1] if spread != "model" else changes:
            config = {**base, **change}
            for steps in (1, 4, 7):
                if not all(k in known for k in change):
                    continue
                s = make(**{k: v for k, v in config.items() if k in known}, **more_config)
                rows.append(run(s, name.split()[0], spread, config, steps))
    # Continuous noise levels: Playground 2.5, CosXL.
    for prediction, levels in [("epsilon", dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras")),
                               ("v_prediction", dict(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, sigma_schedule="exponential"))]:
        config = {**base, "prediction_type": prediction, "edm": levels}
        for name, make, more_config in [("euler", EDMEulerScheduler, {}), ("dpmpp_2m", EDMDPMSolverMultistepScheduler, {}),
                                        ("dpmpp_2m_sde", EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})]:
            # Of one level in an even spread, diffusers takes the least.
            for steps in (4, 7, 20) if levels["sigma_schedule"] == "exponential" else (1, 4, 7, 20):
                rows.append(run(make(prediction_type=prediction, **levels, **more_config), name, "model", config, steps))
    write("schedules.json", rows)


def run(s, sampler, spread, config, steps):
    s.set_timesteps(steps)
    start, outputs, own = (torch.Generator("cpu").manual_seed(n) for n in (1, 2, 3))
    x = torch.randn(8, generator=start) * s.init_noise_sigma
    latents = []
    for t in s.timesteps:
        y = s.scale_model_input(x, t)
        out = torch.randn(8, generator=outputs) + 0.5 * y
        more = {"generator": own} if "generator" in inspect.signature(s.step).parameters else {}
        x = s.step(out, t, x, **more).prev_sample
        latents.append([float(f"{v:.9g}") for v in x.tolist()])
    return {"config": card(config), "sampler": sampler, "spread": spread, "steps": steps, "latents": latents,
            "timesteps": s.timesteps.tolist(), "init_noise_sigma": float(s.init_noise_sigma)}


def tokens():
    folder = os.path.join(HERE, "..", "..", "models", "demo", "model", "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    texts = [
        "", " ", "\t\n \r\n", "a red circle on a blue background", "A RED Circle,on a   BLUE background!!!", "it's I'VE we'll they'd don't 're",
        "1 12 2024 3.14 1,000,000 50% $5", "(masterpiece:1.2), [bad], {best quality}, <lora:x:1>", "hello_world foo-bar a.b.c a/b\\c #tag @me",
        "<|startoftext|>a cat<|endoftext|>", "a<|endoftext|>b <|ENDOFTEXT|> <|end", "Ünïcödé ÄÖÜ ß straße İstanbul ﬁne Ⅷ ǅ",
        "e\u0301 \u00e9 A\u030a \u212b \u1e9b\u0323", "красный круг на синем фоне", "κόκκινος κύκλος", "赤い円 青い背景", "红色圆圈，蓝色背景。", "빨간 원",
        "دائرة حمراء", "עיגול אדום", "ลวงกลมสแดง", "नमस्ते दुनिया", "🙂 🎨🖼️ 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "x²+y³≠½ ∑∫√ ①②③ ٣٤", "a\u00a0b\u2003c\u3000d\u200be\ufefff",
        "a\u0085b\u180ec\u2028d\u2029e\x1cf\x1fg\x0bh\x0ci", "nul\x00byte bell\x07 esc\x1b del\x7f", "\ufffd \U0010ffff \ue000", " 'tis ''s 'S", "....... ,,, ---___===",
        "Pneumonoultramicroscopicsilicovolcanoconiosis", "zzzzqqqqxxxxjjjj kkkkvvvvwwww", "ａｂｃ１２３", "naïve café—déjà vu…", "“quotes” ‘single’ «guillemets»", "a\r\nb\rc",
        "\u0301 leading mark", "ΑΣ ΟΔΟΣ final sigma", "DŽ ŉ ǰ ẞ",
    ]
    rows = [(t, 1) for t in texts] + [("ab", 500), ("🙂", 40), ("a red circle, ", 300), ("!", 200), ("1", 100), ("ü", 300)]
    write("tokens.json", [{"text": t, "repeat": n, "ids": tokenizer(t * n, add_special_tokens=False).input_ids} for t, n in rows])


if __name__ == "__main__":
    tokens()
    noise()
    schedules()
