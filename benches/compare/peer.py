"""What the programs that time one peer have in common."""
import json
import re
import sys
import time as clock


def arguments():
    """MODEL SIZE THREADS STEPS KIND of the command line."""
    folder, size, threads, steps, kind = sys.argv[1:]
    return folder, int(size), int(threads), int(steps), kind


def shapes(config, size):
    """Inputs of a UNet for both guidance passes of a `size` x `size` picture."""
    wanted = {
        "sample": (2, config["in_channels"], size // 8, size // 8),
        "timestep": (),
        "encoder_hidden_states": (2, 77, config["cross_attention_dim"]),
    }
    if config["addition_embed_type"] == "text_time":
        wanted["time_ids"] = (2, 6)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        wanted["text_embeds"] = (2, pooled)
    return wanted


def time(run, count):
    """Seconds of each of `count` runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(count):
        start = clock.perf_counter()
        run()
        seconds.append(clock.perf_counter() - start)
    return seconds


def done(step, decode):
    """Prints what was measured, with the process's peak of resident memory."""
    with open("/proc/self/status") as status:
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024
    print(json.dumps({"steps_s": step, "vae_s": decode, "peak_bytes": peak}))
