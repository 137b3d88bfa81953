#!/usr/bin/env python3
"""Speed and memory of `gemma finetune` beside transformers and PEFT, on the same batches in the same run.

    python tests/reference/measure_finetune.py --gemma build/release/gemma --model FOLDER --text FILE [--cases ..]

Batches of 4 x 256 tokens, LoRA r 16 on all seven projections or all weights. Either program runs --runs times by turns,
in a process of its own; medians of tok/s (the first step left out) and of peak memory, and their ratios.
"""
import json
import pathlib
import statistics
import sys
import tempfile

from check_finetune import HERE, first_adapter, parser_of, run, write_data

# (what is trained, dtype, tokens of a prompt)
CASES = {
    "LoRA bfloat16": ("lora", "bfloat16", 1),
    "LoRA bfloat16, completions of a quarter": ("lora", "bfloat16", 192),
    "LoRA float32": ("lora", "float32", 1),
    "full bfloat16": ("full", "bfloat16", 1),
}


def words_of(args, case, folder, turn):
    what, dtype, prompt = case
    data, start = folder / "data.jsonl", folder / "start"
    if not data.exists():
        write_data(args, data, [(prompt, 256 - prompt)] * 4 * args.steps)
    same = ["--data", data, "--batch-size", 4, "--learning-rate", "1e-4", "--dtype", dtype]
    ours = [args.gemma, "finetune", "-m", args.model, "-t", args.threads, "--in-order", "--max-steps", args.steps,
            "--seed", 1, "--samples", 0, "--out", folder / f"ours-{turn}", "--json", *same]
    theirs = [sys.executable, HERE / "finetune_peft.py", "--model", args.model, "--threads", args.threads,
              "--steps", args.steps, "--out", folder / "theirs", *same]
    if what == "full":
        return ours + ["--full", *args.full_flags.split()], theirs + ["--full"]
    if not start.exists():
        first_adapter(args, start)
    return ours + ["--from", start], theirs + ["--adapter", start]


def ours_of(folder, turn, found):
    rows = [json.loads(line) for line in open(folder / f"ours-{turn}" / "log.jsonl")]
    rows = [row for row in rows if "loss" in row][1:]
    speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    return speed, found["peak_memory_bytes"] / 2**30


def measure(args, name, folder):
    ours, theirs = [], []
    for turn in range(args.runs):
        mine, peer = words_of(args, CASES[name], folder, turn)
        ours.append(ours_of(folder, turn, run(mine)))
        found = run(peer)
        theirs.append((found["tokens_per_second"], found["peak_memory_bytes"] / 2**30))
    speed, memory = (statistics.median(x) for x in zip(*ours))
    peer_speed, peer_memory = (statistics.median(x) for x in zip(*theirs))
    print(f"{name}: {speed:.0f} tok/s, {memory:.2f} GiB; transformers and PEFT {peer_speed:.0f} tok/s, {peer_memory:.2f} GiB; "
          f"{speed / peer_speed:.2f} times, {100 * memory / peer_memory:.0f} % of the memory", flush=True)


def main():
    parser = parser_of(__doc__, 6, CASES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--full-flags", default="", help="more flags of ours for full training")
    args = parser.parse_args()
    print(pathlib.Path("/proc/loadavg").read_text().strip(), "(load before)")
    for name in args.cases.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            measure(args, name, pathlib.Path(folder))


if __name__ == "__main__":
    main()
