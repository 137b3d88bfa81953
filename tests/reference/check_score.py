#!/usr/bin/env python3
"""gemma score beside lm-evaluation-harness on the same weights, in float32 on the CPU.

    python tests/reference/make_wordnet_items.py --wordnet package/dict --out items.jsonl
    python tests/reference/check_score.py --gemma build/release/gemma --model FOLDER items.jsonl

Every item's log-likelihoods, whether they are greedy, acc, acc_norm and their stderr, which the
harness finds by itself (simple_evaluate, a task of its own YAML, its model "hf"); then pairs of
texts that are awkward to cut into tokens. FOLDER holds a tokenizer.json for Python. More flags for
gemma come after `--`: `-- --engine fused --quant int8`. Fails where a log-likelihood differs by more
than --allowed, or a token, acc or acc_norm does. pip install lm_eval==0.4.13 sentencepiece.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

TASK = """task: items
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
num_fewshot: 0
metric_list:
  - metric: acc
  - metric: acc_norm
"""
AWKWARD = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),  # the space moves
    ("The capital of France is \n\t", " Paris"),
    ("no-break\u00a0\u2003\u3000", "space"),
    ("", "Once upon a time"),  # <bos> alone before it
    ("   ", "only space"),
    ("<bos>The end", " is near"),  # no second <bos>
    ("", "<bos>The end"),
    ("super", "califragilistic"),  # pieces that would join
    ("a\n", "\nb"),
    ("1 + 1 =", " 2"),
    ("caf", "é \U0001f389 und Grüße"),
    ("<start_of_turn>user\nHi<end_of_turn>\n", "<start_of_turn>model"),
]


def gemma(args, *more):
    command = [args.gemma, "score", "-m", args.model, "-t", args.threads, *more, *args.flags]
    start = time.monotonic()
    done = subprocess.run(
        [*map(str, command), "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout) | {"process_seconds": time.monotonic() - start}


def harness(args):
    """The harness's model; what it says of the items; seconds to load, and to evaluate."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    start = time.monotonic()
    model = HFLM(
        pretrained=args.model,
        dtype="float32",
        device="cpu",
        batch_size=args.batch,
        softmax_dtype=args.softmax,
    )
    loaded = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(args.items).resolve()
        (pathlib.Path(folder) / "items.yaml").write_text(TASK.format(file=file))
        found = simple_evaluate(
            model,
            tasks=["items"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=100,
            log_samples=True,
        )
    return model, found, loaded - start, time.monotonic() - loaded


def compare_items(ours, found):
    """The largest difference of a log-likelihood; whether all else is the same."""
    theirs = sorted(found["samples"]["items"], key=lambda sample: sample["doc_id"])
    assert len(theirs) == len(ours["items"])
    differences, greedy = [], 0
    for row, sample in zip(ours["items"], theirs, strict=True):
        pairs = zip(row["logprob"], row["is_greedy"], sample["filtered_resps"], strict=True)
        for logprob, is_greedy, (expected, expected_greedy) in pairs:
            differences.append(abs(logprob - float(expected)))
            greedy += is_greedy != bool(expected_greedy)
    results = found["results"]["items"]
    print(f"{len(theirs)} items, {len(differences)} log-likelihoods\n")
    print("| | gemma | lm-evaluation-harness |\n|---|---|---|")
    same = greedy == 0
    for name in ("acc", "acc_norm"):
        values = [ours[name], results[f"{name},none"]]
        errors = [ours[f"{name}_stderr"], results[f"{name}_stderr,none"]]
        print(f"| {name} | {values[0]:.6f} +- {errors[0]:.6f} | {values[1]:.6f} +- {errors[1]:.6f} |")
        same &= values[0] == values[1] and abs(errors[0] - errors[1]) < 1e-9
    mean = sum(differences) / len(differences)
    print(f"\nlargest difference of a log-likelihood {max(differences):.2g}, mean {mean:.2g}")
    print(f"is_greedy differs {greedy} times")
    return max(differences), same


def compare_awkward(args, model):
    """The same for AWKWARD; tokens too."""
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(AWKWARD)]
    expected = model.loglikelihood(requests, disable_tqdm=True)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "pairs.jsonl"
        lines = [json.dumps({"context": a, "choices": [b]}) + "\n" for a, b in AWKWARD]
        file.write_text("".join(lines))
        rows = gemma(args, "--choices", file, "--delimiter", "")["items"]
    worst, same = 0, True
    for (context, text), row, (logprob, is_greedy) in zip(AWKWARD, rows, expected, strict=True):
        if context:
            before, ids = model._encode_pair(context, text)
        else:
            ids = model.tok_encode(text, add_special_tokens=False)
            before = [model.prefix_token_id]
            ids = ids[1:] if ids[0] == before[0] else ids
        equal = row["ids"][0] == ids and row["context_tokens"] == len(before)
        equal &= row["is_greedy"][0] == is_greedy
        if not equal:
            print(f"differs: {context!r} {text!r}: {row['ids'][0]}, expected {ids}")
        same &= equal
        worst = max(worst, abs(row["logprob"][0] - logprob))
    print(f"{len(AWKWARD)} awkward pairs: largest difference {worst:.2g}, tokens equal: {same}")
    return worst, same


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", help="from make_wordnet_items.py")
    parser.add_argument("--gemma", required=True, help="the program")
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1, help="requests in a pass of the harness")
    parser.add_argument("--softmax", help="dtype of the harness's log_softmax [float32]")
    parser.add_argument("--allowed", type=float, default=1e-3)
    parser.add_argument("flags", nargs="*", help="for gemma [--dtype float32]")
    args = parser.parse_args()
    args.flags = args.flags or ["--dtype", "float32"]
    torch.set_num_threads(args.threads)
    ours = gemma(args, "--choices", args.items)
    model, found, load, evaluate = harness(args)
    checks = [compare_items(ours, found), compare_awkward(args, model)]
    n = len(ours["items"])
    print(f"\n{args.threads} threads, batch {args.batch}; gemma {' '.join(args.flags)}")
    print("| seconds | gemma | lm-evaluation-harness |\n|---|---|---|")
    print(f"| whole | {ours['process_seconds']:.1f} | {load + evaluate:.1f}, imports aside |")
    print(f"| scoring | {ours['seconds']:.1f} | {evaluate:.1f} |")
    print(f"| an item | {ours['seconds'] / n:.3f} | {evaluate / n:.3f} |")
    sys.exit(not all(worst <= args.allowed and same for worst, same in checks))


if __name__ == "__main__":
    main()
