#!/usr/bin/env python3
"""gemma patch beside the same edits made with hooks in transformers, and the time of a sweep.

    python tests/reference/check_patch.py --gemma build/release/gemma --model FOLDER

For each edit, the run of one prompt with another one's value in its place, in float32 on the CPU:
the largest difference of the logits of the 512 tokens that ours thinks likeliest. Then a sweep of
resid_post over all layers and positions, once with either, in turn; and the largest difference of
its scores. Fails where logits differ by more than 2e-3. Versions: requirements.txt.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from common import transformers_model

# One token differs, the subject; 20 tokens each with Gemma's vocabulary.
PROMPT = (
    "Our trip to {} was lovely. "
    "Everyone there speaks the same language, and they all still speak"
)
CLEAN, CORRUPTED = PROMPT.format("Paris"), PROMPT.format("Rome")
TOKENS = " French, Italian"
TOP = 512
ALLOWED = 2e-3


def gemma(args, *more):
    command = [args.gemma, "patch", "-m", args.model, "--dtype", "float32", "-t", args.threads]
    done = subprocess.run(
        [*map(str, [*command, *more]), "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def module_of(model, site, layer):
    """The module and whether its input (z) or its output is the site's value."""
    block = model.model.layers[layer]
    return {
        "resid_post": (block, False),
        "attn_out": (block.post_attention_layernorm, False),
        "mlp_out": (block.post_feedforward_layernorm, False),
        "z": (block.self_attn.o_proj, True),
    }[site]


def hooked(module, is_input, act):
    """Registers act(value) -> value at a module's input or output."""
    if is_input:
        return module.register_forward_pre_hook(lambda _, args: (act(args[0]), *args[1:]))

    def on_output(_module, _args, output):
        whole = output if torch.is_tensor(output) else output[0]
        changed = act(whole)
        return changed if torch.is_tensor(output) else (changed, *output[1:])

    return module.register_forward_hook(on_output)


@torch.no_grad()
def last_logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]


def values_of(model, ids, sites):
    """(site, layer) -> its value (1, T, ..) in a run of ids."""
    found, handles = {}, []
    for site, layer in sites:

        def keep(value, key=(site, layer)):
            found[key] = value.clone()
            return value

        handles.append(hooked(*module_of(model, site, layer), keep))
    last_logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def patched_logits(model, ids, site, layer, values, part):
    """The run of ids with `part` (position, slice of channels) of another run's value."""
    position, channels = part

    def put(value):
        value = value.clone()
        value[:, position, channels] = values[site, layer][:, position, channels]
        return value

    handle = hooked(*module_of(model, site, layer), put)
    try:
        return last_logits(model, ids)
    finally:
        handle.remove()


def edits(T, head_dim):
    """(spelling of gemma's edit, site, layer, (position, channels))."""
    every = slice(None)
    for layer in (0, 5, 11, 17):
        for site in ("resid_post", "attn_out", "mlp_out"):
            for position in (4, T - 1):
                yield f"blocks.{layer}.{site}[pos={position}]=other", site, layer, (position, every)
            yield f"blocks.{layer}.{site}=other", site, layer, (every, every)
        head = slice(2 * head_dim, 3 * head_dim)
        yield f"blocks.{layer}.z[head=2]=other", "z", layer, (every, head)
        yield f"blocks.{layer}.z[head=2][pos={T - 1}]=other", "z", layer, (T - 1, head)


def compare_edits(args, model, clean, corrupted):
    """Prints a row for each kind of edit; the largest difference."""
    layers = range(model.config.num_hidden_layers)
    sites = [(s, n) for s in ("resid_post", "attn_out", "mlp_out", "z") for n in layers]
    values = values_of(model, clean, sites)
    plain = last_logits(model, corrupted)
    rows = {}
    for spelling, site, layer, part in edits(len(clean), model.config.head_dim):
        ours = gemma(args, "-p", CORRUPTED, "--other", CLEAN, "--edit", spelling, "--top", TOP)
        theirs = patched_logits(model, corrupted, site, layer, values, part)
        ids = [row["id"] for row in ours["after"]["top"]]
        logits = torch.tensor([row["logit"] for row in ours["after"]["top"]])
        difference = (logits - theirs[ids]).abs().max().item()
        rows.setdefault(site, []).append((difference, (theirs - plain).abs().max().item()))
    print("| site | edits | they move logits by up to | largest difference |\n|---|---|---|---|")
    for site, found in rows.items():
        moved = max(moved for _, moved in found)
        print(f"| {site} | {len(found)} | {moved:.3g} | {max(found)[0]:.2g} |")
    return max(max(found)[0] for found in rows.values())


def their_sweep(model, clean, corrupted, tokens):
    """The same sweep with hooks: one run for each layer and position."""
    layers = range(model.config.num_hidden_layers)
    values = values_of(model, clean, [("resid_post", layer) for layer in layers])
    scores = torch.zeros(len(layers), len(clean))
    for layer in layers:
        for position in range(len(clean)):
            part = (position, slice(None))
            logits = patched_logits(model, corrupted, "resid_post", layer, values, part)
            scores[layer, position] = logits[tokens[0]] - logits[tokens[1]]
    return scores


def compare_sweeps(args, model, clean, corrupted):
    run = ("-p", CLEAN, "--corrupted", CORRUPTED, "--tokens", TOKENS, "--sweep", "resid_post")
    took = {"gemma, whole process": [], "transformers, loaded already": []}
    for _ in range(args.repeats):
        start = time.monotonic()
        ours = gemma(args, *run)
        middle = time.monotonic()
        theirs = their_sweep(model, clean, corrupted, [token["id"] for token in ours["tokens"]])
        took["gemma, whole process"].append(middle - start)
        took["transformers, loaded already"].append(time.monotonic() - middle)
    difference = (torch.tensor(ours["maps"][0]["scores"]) - theirs).abs().max().item()
    print(f"\nsweep of resid_post, {theirs.shape[0]} layers x {theirs.shape[1]} positions, in turn")
    for name, times in took.items():
        listed = ", ".join(f"{t:.1f}" for t in times)
        print(f"{name}: median {statistics.median(times):.1f} s of {listed}")
    ratios = [b / a for a, b in zip(*took.values())]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"ratio: {shown}; scores differ by up to {difference:.2g}")
    return difference


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", required=True, help="the program")
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="of the sweep; 0: only the edits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = transformers_model(args.model, torch.float32, attention="sdpa")
    found = gemma(args, "-p", CLEAN, "--other", CORRUPTED, "--edit", "embed=other", "--top", 1)
    clean, corrupted = found["ids"], found["other_ids"]
    differences = [compare_edits(args, model, clean, corrupted)]
    if args.repeats:
        differences.append(compare_sweeps(args, model, clean, corrupted))
    sys.exit(not max(differences) <= ALLOWED)


if __name__ == "__main__":
    main()
