#!/usr/bin/env python3
"""`gemma finetune --from-scratch` against transformers: the same first weights, the same batches, float32.

    python tests/reference/check_scratch.py --gemma build/release/gemma --config apps/recipes/small_config.json --text BOOK.txt

Trains a tokenizer on the text (apps/recipes/train_tokenizer.py, as many pieces as the config has rows), lets gemma draw a model and train it for --steps on windows of the text in their order, then trains transformers' Gemma3ForCausalLM
from the weights that gemma drew (OUT/initial) on the windows that it cut (OUT/data.jsonl), with torch's AdamW. Prints
both losses beside each other. Exit code 1 where a step's loss is further off than 1e-3. Needs torch, transformers,
safetensors and sentencepiece.
"""
import argparse
import json
import pathlib
import sys
import tempfile

import sentencepiece
import torch
import transformers
from check_finetune import HERE, run

sys.path.append(str(HERE.parents[1] / "apps" / "recipes"))
import train_tokenizer  # noqa: E402


def train_both(args, folder):
    out, tokenizer = folder / "run", folder / "tokenizer.model"
    train_tokenizer.train(args.text, json.loads(pathlib.Path(args.config).read_text())["vocab_size"], tokenizer)
    same = ["--learning-rate", 1e-3, "--warmup", 10, "--schedule", "cosine", "--weight-decay", 0.01,
            "--batch-size", args.batch_size]
    ours = run([args.gemma, "finetune", "--from-scratch", args.config, "--tokenizer", tokenizer, "--plain-text",
                "--data", args.text, "--out", out, "--max-tokens", args.max_tokens, "--in-order", "--max-steps", args.steps,
                "--seed", args.seed, "-t", args.threads, "--json", *same])
    theirs = run([sys.executable, HERE / "finetune_peft.py", "--model", out / "initial", "--data", out / "data.jsonl",
                  "--full", "--dtype", "float32", "--steps", args.steps, "--threads", args.threads,
                  "--out", folder / "theirs", *same])
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return [row["loss"] for row in rows if "loss" in row], ours, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, sentencepiece {sentencepiece.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        losses, ours, theirs = train_both(args, pathlib.Path(folder))
    off = [abs(a - b) for a, b in zip(losses, theirs["losses"], strict=True)]
    print("step    gemma  PyTorch  difference")
    for step in sorted({1, 2, 5, *range(10, args.steps, 10), args.steps}):
        print(f"{step:4} {losses[step - 1]:8.4f} {theirs['losses'][step - 1]:8.4f}  {off[step - 1]:.1e}")
    print(f"{args.steps} steps, largest difference of a loss {max(off):.1e}; {ours['tokens_per_second']:.0f} tok/s, "
          f"PyTorch {theirs['tokens_per_second']:.0f}")
    sys.exit(0 if max(off) < 1e-3 else 1)


if __name__ == "__main__":
    main()
