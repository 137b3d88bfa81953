#!/usr/bin/env python3
"""Compares a file of `gemma capture` with what transformers computes from its ids, value by value.

    gemma capture -m FOLDER --dtype float32 --sites '*' -p "some text" -o capture.safetensors
    python tests/reference/check_capture.py --model FOLDER capture.safetensors

Prints a row for each kind of site (with --each for each site), and fails where one differs by more
than `gemma parity` allows. transformers runs in the file's dtype; its values are caught by hooks,
but for `scores`, formed again from what they caught: see sites.py. Versions: requirements.txt.
"""

import argparse
import math
import sys

import torch
from safetensors import safe_open

from common import transformers_model
from sites import transformers_sites


def tolerance(kind, dtype, largest):
    """parity_tolerance of inspect/parity.cpp."""
    if dtype != torch.float32:
        return 0.1 * max(1.0, largest)
    return 2e-3 if kind == "logits" else 2e-5 * max(1.0, largest)


def compare(ours, theirs, name):
    """(largest difference, largest |value|) of one site."""
    if ours.shape != theirs.shape:
        sys.exit(f"check_capture.py: error: {name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    difference = (ours.float() - theirs.float()).abs().max().item()
    return difference, theirs.float().abs().max().item()


def prompts(names):
    """The prefixes of the prompts in a file: "", or "prompt.0.", "prompt.1.", .."""
    return sorted((name[: -len("ids")] for name in names if name.endswith("ids")), key=len)


def file_dtype(path):
    """What the file's values were computed in."""
    with safe_open(path, "pt") as file:
        return getattr(torch, file.metadata()["dtype"])


def measure(path, folder, dtype):
    """(prompt prefix, site, largest difference, largest |value|) of every site in the file."""
    with safe_open(path, "pt") as file:
        model = transformers_model(folder, dtype)
        names = list(file.keys())
        for prefix in prompts(names):
            ours = {name[len(prefix) :] for name in names if name.startswith(prefix)} - {"ids"}
            kinds = {name.rsplit(".", 1)[-1] for name in ours}
            theirs = transformers_sites(model, file.get_tensor(prefix + "ids"), kinds.__contains__)
            for name in sorted(ours, key=list(theirs).index):
                yield prefix, name, *compare(file.get_tensor(prefix + name), theirs[name], name)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--each", action="store_true", help="a row for each site")
    parser.add_argument("file", help="what gemma capture wrote")
    args = parser.parse_args()
    dtype = file_dtype(args.file)
    rows, count = {}, 0
    for prefix, name, difference, largest in measure(args.file, args.model, dtype):
        count += 1
        key = prefix + name if args.each else name.rsplit(".", 1)[-1]
        rows.setdefault(key, []).append((difference, largest, prefix + name))
    print("| site | of them | values up to | largest difference | there | allowed |")
    print("|---|---|---|---|---|---|")
    failed = 0
    for key, found in rows.items():
        difference, _, where = max(found, key=lambda row: (math.isnan(row[0]), row[0]))
        where = where if difference != 0 else ""
        largest = max(value for _, value, _ in found)
        kind = key.rsplit(".", 1)[-1]
        bad = [d for d, value, _ in found if not d <= tolerance(kind, dtype, value)]
        failed += len(bad)
        allowed = tolerance(kind, dtype, largest)
        print(
            f"| {key} | {len(found)} | {largest:.4g} | {difference:.3g} | {where} | {allowed:.2g} |"
        )
    print(f"\n{count} sites, {failed} of them differ by more than is allowed")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
