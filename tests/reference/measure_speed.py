#!/usr/bin/env python3
"""Speed of `gemma bench` beside transformers (sdpa, dynamic cache, uncompiled), alternating.

    python tests/reference/measure_speed.py --gemma build/release/gemma --model HF_FOLDER
        [--dtype bfloat16] [--engine eager] [--pairs 5] [--threads 2]

Three tests: decode (96 tokens after a short prompt), prefill (512 random tokens), and decode with
2,000 tokens in the cache. Printed are the medians of both sides, and the median of the ratios pair
by pair with its range: on a machine whose speed drifts only the ratios mean anything.
Versions: requirements.txt.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

DEPTH, DEEP_TOKENS, SHORT_TOKENS, PROMPT_TOKENS = 2000, 32, 96, 512
PROMPT = [2, 818, 5279, 529, 7001, 563]


def rate(count, work):
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


@torch.inference_mode()
def transformers_rates(model):
    options = {"max_new_tokens": SHORT_TOKENS, "min_new_tokens": SHORT_TOKENS, "do_sample": False}
    decode = rate(SHORT_TOKENS, lambda: model.generate(torch.tensor([PROMPT]), **options))
    text = torch.randint(5, 200_000, (1, PROMPT_TOKENS))
    prefill = [rate(PROMPT_TOKENS, lambda: model(text, logits_to_keep=1)) for _ in range(3)]

    cache = DynamicCache(config=model.config)
    step = {"past_key_values": cache, "logits_to_keep": 1, "use_cache": True}
    model(torch.randint(5, 200_000, (1, DEPTH)), **step)
    model(torch.tensor([PROMPT[-1:]]), **step)  # warm-up

    def go_on():
        ids = torch.tensor([PROMPT[-1:]])
        for _ in range(DEEP_TOKENS):
            ids = model(ids, **step).logits[:, -1].argmax(-1, keepdim=True)

    return decode, statistics.median(prefill), rate(DEEP_TOKENS, go_on)


def gemma_rates(args):
    def bench(*flags):
        shared = [args.gemma, "bench", "-m", args.model, "--dtype", args.dtype]
        shared += ["--engine", args.engine, "-t", args.threads, "-r", "3", "-o", "json"]
        done = subprocess.run([*shared, *flags], check=True, capture_output=True, text=True)
        return json.loads(done.stdout)[0]["avg_ts"]

    return (
        bench("-p", "0", "-n", str(SHORT_TOKENS)),
        bench("-p", str(PROMPT_TOKENS), "-n", "0"),
        bench("-p", "0", "-n", str(DEEP_TOKENS), "-d", str(DEPTH)),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", required=True, help="the gemma program")
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--engine", default="eager", help="engine of the gemma side")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    torch.set_num_threads(int(args.threads))
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    transformers_rates(model)  # warm-up
    if pathlib.Path("/proc/loadavg").exists():
        print("load", pathlib.Path("/proc/loadavg").read_text().split()[0])
    sides = [(lambda: gemma_rates(args), []), (lambda: transformers_rates(model), [])]
    for pair in range(args.pairs):
        for run, results in sides if pair % 2 == 0 else reversed(sides):
            results.append(run())
    for test, name in enumerate(("decode", "prefill", "decode at 2000")):
        ours, theirs = ([result[test] for result in side[1]] for side in sides)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"{args.dtype} {name:15} gemma {statistics.median(ours):7.1f}"
            f"  transformers {statistics.median(theirs):7.1f}"
            f"  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
