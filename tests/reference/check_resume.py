#!/usr/bin/env python3
"""A fine-tuning run that is killed again and again ends in the bits of one that is not.

    python tests/reference/check_resume.py --gemma build/release/gemma --model FOLDER --data FILE.jsonl

Trains an adapter in float32, with dropout and accumulation, once to the end; then as one run that kill -9 cuts --cuts
times and --resume takes up: every second time at a random moment after the first step, else while a checkpoint lies
under its temporary name. FILE: some 40 lines of prompt and completion. Fails where the adapters differ in a bit.
"""
import argparse
import hashlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time


def command(args, out, *more):
    words = [args.gemma, "finetune", "-m", args.model, "-t", args.threads, "--data", args.data, "--out", out,
             "--dtype", "float32", "--lora-rank", 8, "--lora-dropout", 0.1, "--batch-size", 2, "--accumulate", 2,
             "--max-tokens", 48, "--max-steps", args.steps, "--save-every", 1, "--seed", 5, "--samples", 0, *more]
    return [str(word) for word in words]


def weights(out):
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def steps_done(out):
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines[:-1] or lines if line.endswith("}")), default=0)


def is_writing(out):
    return any(path.name.startswith("step-") and "." in path.name for path in (out / "checkpoints").glob("*"))


def cut(args, out, more, while_writing):
    """Kills a run; the step after which it was, whether a checkpoint was being written; None if it ended first."""
    before = steps_done(out)
    running = subprocess.Popen(command(args, out, *more), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while running.poll() is None and steps_done(out) <= before:
        time.sleep(0.01)
    wait = 0 if while_writing else random.uniform(0, args.longest)
    until = time.monotonic() + wait
    while running.poll() is None and (not is_writing(out) if while_writing else time.monotonic() < until):
        time.sleep(0 if while_writing else 0.005)
    running.kill()
    running.wait()
    return None if running.returncode == 0 else (steps_done(out), is_writing(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--longest", type=float, default=3, help="seconds after a step within which it is killed")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = (pathlib.Path(folder) / name for name in ("whole", "parts"))
        subprocess.run(command(args, whole), check=True, stderr=subprocess.DEVNULL)
        cuts = []
        for i in range(args.cuts):
            found = cut(args, parts, ["--resume"] if i else [], while_writing=i % 2 == 1)
            if found is None:
                sys.exit(f"the run ended before cut {i + 1}: more --steps")
            cuts.append(found)
        subprocess.run(command(args, parts, "--resume"), check=True, stderr=subprocess.DEVNULL)
        same = weights(whole) == weights(parts)
        print(f"{len(cuts)} cuts, after steps {', '.join(str(step) for step, _ in cuts)}; "
              f"{sum(writing for _, writing in cuts)} left half a checkpoint; adapters {'equal' if same else 'DIFFER'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
