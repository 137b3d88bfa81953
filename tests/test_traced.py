#!/usr/bin/env python3
"""`gemma trace` seen from Python: torch.jit.load runs its file, and greedy ids are those of the gemma program.

    python3 tests/test_traced.py GEMMA MODEL [--dtype float32] [-n 40] [--prompts 1,40,700] [--uncached 8]
    python3 tests/test_traced.py GEMMA --real ..     the same on $GEMMA_TORCH_TEST_MODEL

For each prompt length: the eager and the traced engine, the latter from the model and from files frozen and not; and
those files in this process, through the cache and, for the first --uncached tokens, without it. Needs torch.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

try:
    import torch
except ImportError as missing:
    print(f"skipped: {missing}. Hint: cmake/setup.sh installs PyTorch into build/venv")
    sys.exit(77)


def gemma(program, *words):
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def prompt_of(length, vocab_size):
    return [2] + [(37 * i + 11) % (vocab_size - 10) + 10 for i in range(1, length)]


def cached(script, prompt, count):
    """The README's loop, with a prompt read in chunks."""
    script.global_positions.fill_(-1)
    script.local_positions.fill_(-1)
    made, rows, position = [], [], 0
    while len(made) < count:
        ids = prompt[position : position + script.chunk] if position < len(prompt) else made[-1:]
        logits = script(torch.tensor([ids]), torch.arange(position, position + len(ids)))
        position += len(ids)
        if position >= len(prompt):
            rows.append(logits[0, 0])
            made.append(int(logits.argmax()))
    return made, torch.stack(rows)


def uncached(script, prompt, count):
    made, rows = [], []
    while len(made) < count:
        ids = prompt + made
        logits = script.forward_uncached(torch.tensor([ids]), torch.arange(len(ids)))
        rows.append(logits[0, 0])
        made.append(int(logits.argmax()))
    return made, torch.stack(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gemma")
    parser.add_argument("model", nargs="?", default=os.environ.get("GEMMA_TORCH_TEST_MODEL"))
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-n", type=int, default=40)
    parser.add_argument("--prompts", default="1,40,700")
    parser.add_argument("--uncached", type=int, default=8)
    args = parser.parse_args()
    if args.model is None:
        print("skipped: GEMMA_TORCH_TEST_MODEL is not set. Hint: bash cmake/test.sh")
        return 77
    torch.set_num_threads(2)
    prompts = [int(word) for word in args.prompts.split(",")]
    run = ["-m", args.model, "--dtype", args.dtype]
    info = json.loads((pathlib.Path(args.model) / "config.json").read_text())
    failed = 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {name: f"{folder}/{name}.ts" for name in ("plain", "frozen")}
        for name, file in files.items():
            more = ["--freeze"] if name == "frozen" else []
            gemma(args.gemma, "trace", *run, "--ctx", max(prompts) + args.n, "-o", file, *more)
        scripts = {name: torch.jit.load(file) for name, file in files.items()}
        for length in prompts:
            prompt = prompt_of(length, info["vocab_size"])
            words = ["generate", *run, "--ids", ",".join(map(str, prompt)), "-n", args.n, "--greedy", "--json"]
            engines = {
                "traced": ["--engine", "traced"],
                "traced, plain file": ["--engine", "traced", "--traced-file", files["plain"]],
                "traced, frozen file": ["--engine", "traced", "--traced-file", files["frozen"]],
            }
            want = json.loads(gemma(args.gemma, *words, "--engine", "eager"))["ids"]
            got = {name: json.loads(gemma(args.gemma, *words, *more))["ids"] for name, more in engines.items()}
            rows = {}
            for name, script in scripts.items():
                got[f"Python, {name}"], rows[name] = cached(script, prompt, len(want))
                some = min(args.uncached, len(want))
                got[f"Python, {name}, uncached"], alone = uncached(script, prompt, some)
                rows[f"{name}, uncached"] = alone
            for name, ids in got.items():
                same = ids == want[: len(ids)]
                failed += not same
                print(f"prompt of {length}, {name}: {len(ids)} ids {'equal' if same else f'{ids}, expected {want}'}")
            exact = torch.equal(rows["plain"], rows["frozen"])
            failed += not exact
            difference = (rows["plain, uncached"] - rows["plain"][: len(rows["plain, uncached"])]).abs().max()
            print(f"prompt of {length}: frozen logits {'equal' if exact else 'differ'};"
                  f" without the cache they differ by {difference:.1e} at most")
            failed += not difference < (1e-3 if args.dtype == "float32" else 1)
    print("failed" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
