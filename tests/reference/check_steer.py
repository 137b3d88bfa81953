#!/usr/bin/env python3
"""gemma steer beside transformers, NumPy and llama.cpp.

    python tests/reference/check_steer.py --gemma build/release/gemma --model FOLDER \\
        [--llama-perplexity PROGRAM --gguf BF16.gguf]

Directions from the pairs of tests/golden/steer_pairs.jsonl, by mean and by PCA, against hidden
states of transformers and NumPy's SVD; greedy text and next-token log-odds under a direction
against a forward hook that adds it; all in float32 on the CPU. With llama.cpp, the perplexity of
some of tests/golden/long_text.txt with our control vector at several strengths, in either program.
Fails where a difference is above what is written below. Versions: requirements.txt.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file

from common import transformers_model

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
PAIRS, HELD_OUT = GOLDEN / "steer_pairs.jsonl", GOLDEN / "steer_heldout.txt"
TOWARD = " good, great, excellent, amazing, wonderful"
AWAY = " bad, terrible, awful, horrible, poor"
LAYER, STRENGTHS = 10, (-2, -1, 0, 1, 2)
LLAMA_LAYERS, LLAMA_STRENGTHS = range(8, 13), (0, 0.25, -0.25, 0.5, 1)
WINDOW = 128  # tokens, of perplexities
DIRECTION_ALLOWED = 1e-4  # of the largest number of a vector
SCORE_ALLOWED = 2e-4
PERPLEXITY_ALLOWED = 0.02  # relative: llama.cpp computes in bfloat16 here


def gemma(args, *more):
    command = [args.gemma, "steer", *more, "-m", args.model, "--dtype", "float32"]
    command += ["-t", args.threads, "--json"]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def ids_of(args, *text):
    command = [args.gemma, "tokenize", "-m", args.model, *map(str, text), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["ids"]


@torch.no_grad()
def pooled(model, ids):
    """What leaves each layer, (L, E): at the last position, and as the mean after BOS."""
    found = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for block in model.model.layers
    ]
    model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    rows = torch.stack([value[0].double() for value in found])
    return {"last": rows[:, -1], "mean": rows[:, 1:].mean(1)}


def expected(differences, method):
    """The direction (E) of differences (P, E)."""
    mean = differences.mean(0)
    if method == "mean":
        return mean
    unit = np.linalg.svd(differences, full_matrices=False)[2][0]
    return unit * (unit @ mean)


def check_directions(args, model, folder):
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    sides = ("positive", "negative")
    values = [[pooled(model, ids_of(args, "-p", pair[side])) for side in sides] for pair in pairs]
    worst = 0
    print("| direction | layers | largest difference, of the vector's largest number |")
    print("|---|---|---|")
    for pool in ("last", "mean"):
        differences = torch.stack([a[pool] - b[pool] for a, b in values], 1).numpy()  # (L, P, E)
        for method in ("mean", "pca"):
            out = folder / f"{method}_{pool}.safetensors"
            how = ("--method", method, "--pool", pool)
            gemma(args, "make", "--pairs", PAIRS, *how, "-o", out)
            ours = load_file(out)
            found = []
            for layer, rows in enumerate(differences):
                want = expected(rows, method)
                got = ours[f"direction.{layer}"].double().numpy()
                found.append(np.abs(got - want).max() / np.abs(want).max())
            print(f"| {method}, {pool} | {len(found)} | {max(found):.2g} |")
            worst = max(worst, *found)
    return worst <= DIRECTION_ALLOWED


def steering(model, vectors, strength, layers=(LAYER,)):
    """Hooks that add strength * vector to what leaves each of the layers."""

    def hook_of(vector):
        def hook(_module, _args, output):
            whole = output if torch.is_tensor(output) else output[0]
            whole = whole + strength * vector
            return whole if torch.is_tensor(output) else (whole, *output[1:])

        return hook

    return [
        model.model.layers[layer].register_forward_hook(hook_of(vectors[f"direction.{layer}"]))
        for layer in layers
    ]


@torch.no_grad()
def their_scores(model, prompts, tokens, away):
    scores = []
    for ids in prompts:
        logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
        p = logits.double().log_softmax(0)
        scores.append((p[tokens].logsumexp(0) - p[away].logsumexp(0)).item())
    return scores


def check_measure(args, model, direction):
    run = ("--direction", direction, "--layers", LAYER)
    strengths = "--strengths=" + ",".join(map(str, STRENGTHS))
    of = ("--prompts", HELD_OUT, "--tokens", TOWARD, "--against", AWAY)
    ours = gemma(args, "measure", *run, strengths, *of)
    vectors = load_file(direction)
    prompts = [prompt["ids"] for prompt in ours["prompts"]]
    toward, away = ([token["id"] for token in ours[key]] for key in ("tokens", "against"))
    print("\n| strength | mean score | with hooks | largest difference of a prompt | KL |")
    print("|---|---|---|---|---|")
    worst = 0
    for row in ours["rows"]:
        handles = steering(model, vectors, row["strength"])
        theirs = their_scores(model, prompts, toward, away)
        for handle in handles:
            handle.remove()
        worst = max(worst, *(abs(a - b) for a, b in zip(row["scores"], theirs)))
        difference = max(abs(a - b) for a, b in zip(row["scores"], theirs))
        mean = sum(theirs) / len(theirs)
        shown = f"{row['mean']:.4f} | {mean:.4f} | {difference:.2g} | {row['kl']:.3f}"
        print(f"| {row['strength']:g} | {shown} |")
    print(f"grows with strength: {ours['grows']}")
    return worst <= SCORE_ALLOWED


@torch.no_grad()
def check_text(args, model, direction):
    """Greedy text under the direction, ours cached token by token, theirs with hooks."""
    run = ("--direction", direction, "--layers", LAYER)
    same = []
    for strength in (-2, 2):
        more = (f"--strength={strength}", "-p", "I think the new film is", "-n", "24", "--greedy")
        ours = gemma(args, "generate", *run, *more)
        handles = steering(model, load_file(direction), strength)
        ids = list(ours["prompt_ids"])
        for _ in ours["ids"]:
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        for handle in handles:
            handle.remove()
        same.append(ids[len(ours["prompt_ids"]) :] == ours["ids"])
        print(f"strength {strength}: {ours['text']!r}; equal to hooks': {same[-1]}")
    return all(same)


def their_perplexity(args, text, control, strength):
    command = [args.llama_perplexity, "-m", args.gguf, "-f", text, "-c", WINDOW]
    command += ["-t", args.threads, "--no-warmup"]
    if strength:
        command += ["--control-vector-scaled", f"{control}:{strength}"]
        command += ["--control-vector-layer-range", LLAMA_LAYERS[0], LLAMA_LAYERS[-1]]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    if not found:
        sys.exit(done.stdout + done.stderr)
    return float(found.group(1))


@torch.no_grad()
def our_perplexity(model, ids, vectors, strength):
    """As `gemma perplexity -c 128` counts, with hooks; the hooks were compared above."""
    handles = steering(model, vectors, strength, LLAMA_LAYERS)
    scores = []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor([2, *ids[start + 1 : start + WINDOW]])
        half = WINDOW // 2
        logits = model(window[None], use_cache=False, logits_to_keep=half).logits[0, :-1]
        wanted = window[half + 1 :]
        scores += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
    for handle in handles:
        handle.remove()
    return float(np.exp(np.mean(scores)))


def check_llama(args, model, folder):
    control = folder / "control.gguf"
    made = ("make", "--pairs", PAIRS, "--pool", "last", "--format", "gguf")
    gemma(args, *made, "-o", control, "--layers", f"{LLAMA_LAYERS[0]}-{LLAMA_LAYERS[-1]}")
    vectors = load_file(folder / "mean_last.safetensors")
    text = folder / "text.txt"
    text.write_text((GOLDEN / "long_text.txt").read_text(encoding="utf-8")[:2600], encoding="utf-8")
    ids = ids_of(args, "-f", text)
    print("\n| strength | perplexity under hooks, float32 | llama-perplexity | ratio |")
    print("|---|---|---|---|")
    worst = 0
    for strength in LLAMA_STRENGTHS:
        ours = our_perplexity(model, ids, vectors, strength)
        theirs = their_perplexity(args, text, control, strength)
        worst = max(worst, abs(theirs / ours - 1))
        print(f"| {strength} | {ours:.4f} | {theirs:.4f} | {theirs / ours:.5f} |", flush=True)
    return worst <= PERPLEXITY_ALLOWED


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", required=True, help="the program")
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-perplexity", help="llama.cpp's program")
    parser.add_argument("--gguf", help="the same weights in bfloat16, for it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = transformers_model(args.model, torch.float32, attention="eager")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        results = [check_directions(args, model, folder)]
        results.append(check_measure(args, model, folder / "mean_last.safetensors"))
        results.append(check_text(args, model, folder / "mean_last.safetensors"))
        if args.llama_perplexity:
            results.append(check_llama(args, model, folder))
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
