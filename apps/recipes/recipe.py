"""What the recipes share: their flags, training here or in PEFT, results that a later run goes on with, a table."""
import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

PEER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "reference" / "recipes_peft.py"
TRAINING = [("seconds", "seconds", 0), ("processor seconds", "processor_seconds", 0), ("tok/s", "tokens_per_second", 0),
            ("GiB", "peak_gib", 2)]


def parser_of(doc, **defaults):
    """The flags that all recipes have; `defaults` are those that a recipe chooses."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder; the same command goes on in it")
    parser.add_argument("--source", type=pathlib.Path, help="the package, where it is here already")
    parser.add_argument("--gemma", default="build/release/gemma", help="the program")
    parser.add_argument("--model", help="HF folder [the fetched Gemma 3 270M]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--split-seed", type=int, default=1, help="of what is trained on and what is held out")
    parser.add_argument("--seeds", default="1", help="of training, 1,2,3: a run each")
    parser.add_argument("--peer", help="a Python with transformers and PEFT, to train there too")
    for name, kind in (("train", int), ("test", int), ("epochs", int), ("batch-size", int), ("lora-rank", int),
                       ("learning-rate", float), ("max-tokens", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.set_defaults(**{"batch_size": 4, "lora_rank": 16, "max_tokens": 512, **defaults})
    return parser


def run(words, **options):
    """Standard output of a command; its progress and its errors are shown as they come."""
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"recipe: failed with {done.returncode}: {' '.join(map(str, words))}")
    return done.stdout


def write_whole(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_lines(path, rows):
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split(items, counts, draw):
    """As many items as `counts` says for each part, in an order of chance, none in two parts."""
    if sum(counts) > len(items):
        sys.exit(f"recipe: expected at most {len(items)} examples in all, got {sum(counts)}")
    items = draw.sample(items, sum(counts))
    return [items[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]


def gemma_words(args, command):
    return [args.gemma, command, "-t", args.threads] + (["-m", args.model] if args.model else [])


def processor_seconds():
    """Of all commands that have ended: on a machine that others use too, a steadier measure than a clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(args, program, seed, folder):
    """Trains an adapter, <folder>/adapter, or finds it trained; what that took."""
    record = folder / "training.json"
    if record.exists():
        return json.loads(record.read_text())
    shutil.rmtree(folder, ignore_errors=True)  # a run that was cut
    same = ["--data", args.out / "train.jsonl", "--out", folder, "--seed", seed, "--epochs", args.epochs,
            "--batch-size", args.batch_size, "--lora-rank", args.lora_rank, "--learning-rate", args.learning_rate,
            "--max-tokens", args.max_tokens]
    ours = gemma_words(args, "finetune") + ["--dtype", "bfloat16", "--samples", 0, "--json"]
    theirs = [args.peer, PEER, "--model", args.model, "--threads", args.threads, "--dtype", "bfloat16"]
    start, busy, load = time.perf_counter(), processor_seconds(), os.getloadavg()[0]
    found = json.loads(run((ours if program == "gemma" else theirs) + same))
    kept = {name: found[name] for name in ("seconds", "tokens", "tokens_per_second")}
    kept |= {"peak_gib": found["peak_memory_bytes"] / 2**30, "wall_seconds": time.perf_counter() - start,
             "processor_seconds": processor_seconds() - busy, "load": load}
    write_whole(record, json.dumps(kept) + "\n")
    return kept


def runs_of(args):
    """(name, program, seed) of each run: the model as it is, then both programs by turns."""
    programs = ["gemma"] + (["transformers + PEFT"] if args.peer else [])
    yield "before", "before", None
    for seed in args.seeds.split(","):
        for program in programs:
            yield f"{'peft' if program != 'gemma' else 'gemma'}-{seed}", program, int(seed)


def compare(args, evaluate):
    """Rows of all runs. `evaluate(adapter or None, file)` gives the measures of one, as a dict.

    Those that <out>/results.jsonl has are not run again; it is refused if its settings are others.
    """
    if args.peer and not args.model:
        sys.exit("recipe: --peer: expected --model too, a folder that transformers reads")
    file = args.out / "results.jsonl"
    free = ("out", "source", "gemma", "model", "seeds", "peer")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    rows = read_lines(file) if file.exists() else []
    if any(row["settings"] != settings for row in rows):
        sys.exit(f"recipe: {file}: expected the settings of its runs, {rows[0]['settings']}. Hint: another --out")
    rows = {row["run"]: row for row in rows}
    for name, program, seed in runs_of(args):
        if name in rows:
            continue
        print(f"recipe: {name}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        row = {"run": name, "program": program, "seed": seed}
        if seed is not None:
            row |= train(args, program, seed, args.out / name)
        row |= evaluate(None if seed is None else args.out / name / "adapter", args.out / f"{name}.jsonl")
        rows[name] = row | {"settings": settings}
        write_lines(file, rows.values())
    return [rows[name] for name, _, _ in runs_of(args)]


def cell(rows, key, digits):
    """The mean of some runs, with the least and the most; a dash where nothing was measured."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def table(rows, columns):
    """Markdown, a line for each program. Columns are (title, key of a row, digits)."""
    columns = columns + TRAINING
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for program in dict.fromkeys(row["program"] for row in rows):
        mine = [row for row in rows if row["program"] == program]
        cells = [cell(mine, key, digits) for _, key, digits in columns]
        lines.append(f"| {program} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
