#!/usr/bin/env python3
"""`mpirun -np N gemma finetune` beside one rank with N times the accumulation: equality, speed, bytes sent.

    python tests/reference/measure_ranks.py --gemma build/release/gemma --model FOLDER --text FILE [--cases ..]

The same --rows x --tokens tokens a batch, --threads on each rank, dropout 0. For each case: the largest difference of a
step's loss and of a trained tensor against its norm; medians of a step's seconds (the first left out) on both sides, of
the seconds waited after a rank's own gradients, and the bytes of gradients a step. From one rank's seconds a batch and
those bytes, a prediction for --machines that a ring joins at --gigabits: each sends 2 (M - 1) / M of the bytes, and none of
that is hidden behind the backward pass (at worst), or all of it but what is not in a block (at best). Needs an MPI.
"""
import json
import os
import pathlib
import statistics
import tempfile

from check_finetune import parser_of, run, write_data
from safetensors.torch import load_file

# (flags, dtype)
CASES = {
    "LoRA float32": ((), "float32"),
    "LoRA bfloat16": ((), "bfloat16"),
    "full bfloat16": (("--full",), "bfloat16"),
    "full float32": (("--full",), "float32"),
}
OUTSIDE_BLOCKS = 4 * (262144 * 640 + 640)  # bytes of the embedding and the last norm


def train(args, case, folder, ranks):
    flags, dtype = CASES[case]
    out = folder / f"ranks-{ranks}"
    words = [args.gemma, "finetune", "-m", args.model, "--dtype", dtype, "-t", args.threads, "--data", folder / "data.jsonl",
             "--batch-size", args.rows, "--accumulate", args.ranks // ranks, "--max-steps", args.steps, "--seed", 1,
             "--learning-rate", "1e-4", "--warmup", 1, "--samples", 0, "--out", out, "--json", *flags]
    if ranks > 1:
        words = ["mpirun", "-np", ranks, *words]
    found = run(words)
    file = "model/model.safetensors" if flags else "adapter/adapter_model.safetensors"
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return found, [row for row in rows if "loss" in row], load_file(out / file)


def compare(args, case, folder):
    expected, one_rows, one = train(args, case, folder, 1)
    found, rows, many = train(args, case, folder, args.ranks)
    loss = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rows, one_rows, strict=True))
    off = max(((many[name].double() - one[name].double()).norm() / one[name].double().norm()).item() for name in one)
    same = sum(bool((many[name] == one[name]).all()) for name in one)
    print(f"{case}, {args.steps} steps: losses within {loss:.1e}, tensors within {off:.1e} of their norm, "
          f"{same} of {len(one)} the same bits")
    alone, together, waited = (statistics.median(row[name] for row in part[1:]) for part, name in (
        (one_rows, "seconds"), (rows, "seconds"), (rows, "waited_seconds")))
    sent = found["exchanged_bytes_per_step"]
    print(f"  a step: one rank {alone:.2f} s, {args.ranks} ranks {together:.2f} s ({alone / together:.2f} times), of which "
          f"{waited:.3f} s waited; {sent / 1e6:.2f} MB of gradients")
    predict(args, alone / args.ranks, sent, bool(CASES[case][0]))


def predict(args, seconds, sent, full):
    machines = args.machines
    wire = 2 * (machines - 1) / machines * sent / (args.gigabits * 1e9 / 8)
    best = wire * OUTSIDE_BLOCKS / sent if full else 0
    print(f"  predicted, {machines} machines at {args.gigabits} Gbit/s: {2 * (machines - 1) / machines * sent / 1e6:.1f} MB "
          f"sent by each in {wire:.3f} s beside {seconds:.2f} s of computing: {machines * seconds / (seconds + wire):.2f} to "
          f"{machines * seconds / (seconds + best):.2f} times one machine")


def main():
    parser = parser_of(__doc__, 4, CASES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--machines", type=int, default=8)
    parser.add_argument("--gigabits", type=float, default=10)
    args = parser.parse_args()
    os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    print(pathlib.Path("/proc/loadavg").read_text().strip(), "(load before)")
    for case in args.cases.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            write_data(args, pathlib.Path(folder) / "data.jsonl",
                       [(1, args.tokens - 1)] * args.rows * args.ranks * args.steps)
            compare(args, case, pathlib.Path(folder))


if __name__ == "__main__":
    main()
