#!/usr/bin/env python3
"""`gemma finetune` against transformers and PEFT: the same first matrices, the same batches, dropout 0.

    python tests/reference/check_finetune.py --gemma build/release/gemma --model FOLDER --text FILE [--cases lora,..]

For each case ten optimiser steps in float32: the largest difference of a step's loss, and for every trained tensor the
difference of its change against the size of the tensor. Then an adapter trained here is run in PEFT. Needs torch,
transformers, peft and safetensors.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import peft
import torch
import transformers
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).resolve().parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = {"lora": "2e-4", "full": "2e-5"}


def write_data(args, path, lengths):
    """Pieces of a text as prompts and completions of these lengths: lines of ids."""
    ids = transformers.AutoTokenizer.from_pretrained(args.tokenizer or args.model)(
        pathlib.Path(args.text).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    with open(path, "w") as file:
        at = 0
        for prompt, completion in lengths:
            row = ids[at : at + prompt + completion - 1]
            at += len(row)
            row = [2] + row
            file.write(json.dumps({"prompt_ids": row[:prompt], "completion_ids": row[prompt:]}) + "\n")


def first_adapter(args, folder):
    torch.manual_seed(3)
    model = base_of(args)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=ALL)
    peft.get_peft_model(model, config).save_pretrained(folder)


def base_of(args):
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def run(words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stderr}")
    return json.loads(done.stdout)


def train_both(args, case, folder):
    what, accumulate = case
    data, start = folder / "data.jsonl", folder / "start"
    shapes = [(1, 63), (24, 40), (40, 17), (8, 30)]
    write_data(args, data, [shapes[i % len(shapes)] for i in range(4 * args.steps * accumulate)])
    same = ["--data", data, "--learning-rate", RATES[what], "--warmup", 2, "--weight-decay", 0.01,
            "--batch-size", 4, "--accumulate", accumulate, "--schedule", "cosine"]
    ours = [args.gemma, "finetune", "-m", args.model, "--dtype", "float32", "-t", args.threads, "--in-order",
            "--max-steps", args.steps, "--seed", 1, "--out", folder / "ours", "--json", *same]
    theirs = [sys.executable, HERE / "finetune_peft.py", "--model", args.model, "--dtype", "float32",
              "--threads", args.threads, "--steps", args.steps, "--out", folder / "theirs", "--save",
              "--loss-dtype", args.loss_dtype, *same]
    if what == "lora":
        first_adapter(args, start)
        ours += ["--from", start]
        theirs += ["--adapter", start]
    else:
        ours.append("--full")
        theirs.append("--full")
    found, expected = run(ours), run(theirs)
    rows = [json.loads(line) for line in open(folder / "ours" / "log.jsonl")]
    return [row["loss"] for row in rows if "loss" in row], expected["losses"], found


def trained_tensors(args, what, folder):
    """(ours, theirs, before) by one name."""
    theirs = load_file(folder / "theirs" / "trained.safetensors")
    if what == "lora":
        before = load_file(folder / "start" / "adapter_model.safetensors")
        ours = load_file(folder / "ours" / "adapter" / "adapter_model.safetensors")
        theirs = {name.replace(".default.", "."): tensor for name, tensor in theirs.items()}
    else:
        before = {name: tensor.float() for name, tensor in load_file(pathlib.Path(args.model) / "model.safetensors").items()}
        ours = load_file(folder / "ours" / "model" / "model.safetensors")
    return ours, theirs, before


def compare(args, name, case, folder):
    losses, expected, _ = train_both(args, case, folder)
    worst_loss = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    ours, theirs, before = trained_tensors(args, case[0], folder)
    if set(ours) != set(theirs):
        sys.exit(f"{name}: other tensors: {sorted(set(ours) ^ set(theirs))[:6]}")
    of_norm, of_change, worst = 0.0, 0.0, ""
    for key, want in theirs.items():
        off = (ours[key].float() - want).norm().item()
        if off / want.norm().item() > of_norm:
            of_norm, worst = off / want.norm().item(), key
        of_change = max(of_change, off / (want - before[key]).norm().item())
    print(f"{name}: losses {expected[0]:.4f} .. {expected[-1]:.4f}, largest difference {worst_loss:.1e}; "
          f"{len(theirs)} tensors, largest difference {of_norm:.1e} of a tensor's norm ({worst}), "
          f"{of_change:.1e} of its change", flush=True)
    return worst_loss < 1e-4 and of_norm < 1e-4


def compare_logits(args, folder):
    """An adapter trained here, in PEFT."""
    ids = [2, 818, 5279, 529, 7001, 563, 506, 2150, 699, 236761]
    adapter, out = folder / "ours" / "adapter", folder / "logits.safetensors"
    model = peft.PeftModel.from_pretrained(base_of(args), adapter).eval()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    subprocess.run([args.gemma, "capture", "-m", args.model, "--dtype", "float32", "--sites", "logits", "--lora", adapter,
                    "--ids", ",".join(map(str, ids)), "-o", out], check=True, capture_output=True)
    off = (load_file(out)["logits"][0] - want).abs().max().item()
    print(f"an adapter trained here, in PEFT: largest difference of a logit {off:.1e}")
    return off < 2e-3


CASES = {"lora": ("lora", 1), "lora, accumulated": ("lora", 3), "full": ("full", 1), "full, accumulated": ("full", 2)}


def parser_of(text, steps, cases):
    """The flags that this script and measure_finetune.py share."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gemma", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="a folder that transformers reads one from [--model]")
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default=";".join(cases), help="some of them, joined by ;")
    return parser


def main():
    parser = parser_of(__doc__, 10, CASES)
    parser.add_argument("--loss-dtype", default="float64", help="of the oracle's softmax, see finetune_peft.py")
    args = parser.parse_args()
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    good = True
    for name in args.cases.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            good &= compare(args, name, CASES[name], pathlib.Path(folder))
            if name == "lora":
                good &= compare_logits(args, pathlib.Path(folder))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
