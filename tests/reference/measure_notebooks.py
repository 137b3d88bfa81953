#!/usr/bin/env python3
"""Speed of `gemma bench` beside the reference notebooks' own classes and loop, in pairs that alternate.

    python tests/reference/measure_notebooks.py --gemma build/release/gemma --model HF_FOLDER --notebooks FOLDER
        [--dtype bfloat16] [--pairs 3] [--threads 2] [-n 64] [--modes plain,plain-compiled,kv,kv-compiled]

FOLDER is ch05/12_gemma3 of github.com/rasbt/LLMs-from-scratch. Printed are the medians of both sides, and the median of
the ratios pair by pair with its range. "Compiled" is torch.compile there, the fused engine here. Needs a compiler for
torch.compile. Versions: requirements.txt.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import time

import torch
from safetensors.torch import load_file

PROMPT = [2, 818, 5279, 529, 7001, 563]
WANTED = (
    "class ",
    "def compute_rope",
    "def load_weights",
    "GEMMA3_CONFIG_270M =",
    "def generate_text_basic_stream",
)
OURS = {
    "plain": ["--engine", "eager", "--no-cache"],
    "plain-compiled": ["--engine", "fused", "--no-cache"],
    "kv": ["--engine", "eager"],
    "kv-compiled": ["--engine", "fused"],
}


def notebook_rate(args, mode):
    """A function that gives the notebook's tok/s."""
    name = "standalone-gemma3-plus-kvcache" if mode.startswith("kv") else "standalone-gemma3"
    notebook = json.loads((args.notebooks / f"{name}.ipynb").read_text(encoding="utf-8"))
    space = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code" and any(word in source for word in WANTED)
        if code and "GemmaTokenizer" not in source:  # which needs a package and a file of its own
            exec(compile(source, name, "exec"), space)
    config = space["GEMMA3_CONFIG_270M"] | {"dtype": getattr(torch, args.dtype)}
    model = space["Gemma3Model"](config)
    weights = load_file(pathlib.Path(args.model) / "model.safetensors")
    space["load_weights_into_gemma"](model, config, weights)
    model.eval()
    if mode.endswith("compiled"):
        model = torch.compile(model)

    def rate():
        ids = torch.tensor([PROMPT])
        stream = space["generate_text_basic_stream"](
            model=model, token_ids=ids, max_new_tokens=args.n
        )
        start = time.perf_counter()
        count = sum(1 for _ in stream)
        return count / (time.perf_counter() - start)

    rate()
    return rate


def our_rate(args, mode):
    command = [args.gemma, "bench", "-m", args.model, "--dtype", args.dtype, "-p", "0", "-d", "5"]
    command += ["-n", args.n, "-t", args.threads, "-r", "1", "-o", "json", *OURS[mode]]
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return json.loads(done.stdout)[0]["median_ts"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--notebooks", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--modes", default=",".join(OURS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| tok/s | gemma | the notebook | ratio |\n|---|---|---|---|", flush=True)
    for mode in args.modes.split(","):
        theirs = notebook_rate(args, mode)
        pairs = [(our_rate(args, mode), theirs()) for _ in range(args.pairs)]
        ours, notebook = (statistics.median(side) for side in zip(*pairs))
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"| {mode}, {args.dtype} | {ours:.1f} | {notebook:.1f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
