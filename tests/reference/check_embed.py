#!/usr/bin/env python3
"""gemma embed beside transformers' hidden states, in float32.

    python tests/reference/check_embed.py --gemma build/release/gemma --model FOLDER --work DIR

For each pooling and two choices of layers: vectors of length 1 of texts of 2 to 600 tokens, run
eight at a time (padded) and one by one, beside the pooled hidden_states of transformers, text by
text. The table has the largest difference of an entry of ours from theirs for either, of ours
batched from ours alone, and the least cosine with theirs. Fails where an entry differs by more than
1e-5. Versions: requirements.txt.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
import torch

from common import transformers_model

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
SENTENCES = [
    "The cat sat on the mat.",
    "A kitten was sitting on a rug.",
    "Interest rates rose by half a percent.",
    "The central bank made borrowing more expensive.",
    "Wie spät ist es?",
    "What time is it?",
    "Hi",
    "def add(a, b):\n    return a + b",
]
LONG = 2600  # characters, more than one pass of 512 tokens
CHOICES = {"final_norm": None, "layers 5,11": [5, 11]}
ALLOWED = 1e-5


def vectors(args, texts, *more):
    out = args.work / "vectors.npy"
    command = [args.gemma, "embed", "-m", args.model, "--dtype", "float32", "-t", args.threads]
    command += ["--prompts-jsonl", texts, "-o", out, "--format", "npy", *more]
    subprocess.run([*map(str, command)], stdout=subprocess.DEVNULL, check=True)
    return np.load(out).astype(np.float64)


@torch.no_grad()
def hidden_states(model, texts):
    """Of each text its (layers + 1, T, E): index n + 1 is resid_post of layer n, but the last one
    is after the final norm."""
    found = []
    for ids in texts:
        states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        found.append(torch.cat(states).double().numpy())
    return found


def pooled(states, pooling, layers):
    """states (layers + 1, T, E) -> (E)"""
    x = states[-1] if layers is None else np.mean([states[n + 1] for n in layers], axis=0)
    tokens = x.shape[0]
    weights = {
        "mean": np.ones(tokens),
        "last": np.eye(tokens)[-1],
        "weighted": np.arange(1, tokens + 1),
    }[pooling]
    vector = weights @ x / weights.sum()
    return vector / np.linalg.norm(vector)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="HF folder")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    texts = [*SENTENCES, (GOLDEN / "long_text.txt").read_text()[:LONG]]
    ids = []
    for text in texts:
        command = [args.gemma, "tokenize", "-m", args.model, "-p", text, "--json"]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True)
        ids.append(json.loads(done.stdout)["ids"])
    file = args.work / "texts.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ids))
    print("tokens:", *map(len, ids))
    states = hidden_states(transformers_model(args.model, torch.float32, "sdpa"), ids)
    print(f"{'':22} {'batched':>10} {'alone':>10} {'one another':>12} {'least cosine':>13}")
    worst = 0.0
    for name, layers in CHOICES.items():
        for pooling in ("mean", "last", "weighted"):
            more = ["--pooling", pooling]
            more += [] if layers is None else ["--layers", ",".join(map(str, layers))]
            want = np.stack([pooled(x, pooling, layers) for x in states])
            batched = vectors(args, file, *more, "--batch", 8)
            alone = vectors(args, file, *more, "--batch", 1)
            differences = [abs(batched - want).max(), abs(alone - want).max()]
            between, cosine = abs(batched - alone).max(), (batched * want).sum(1).min()
            worst = max(worst, *differences)
            print(f"{name + ', ' + pooling:22} {differences[0]:10.2g} {differences[1]:10.2g} "
                  f"{between:12.2g} {cosine:13.9f}", flush=True)  # fmt: skip
    if worst > ALLOWED:
        sys.exit(f"largest difference: expected at most {ALLOWED}, got {worst:.3g}")


if __name__ == "__main__":
    main()
