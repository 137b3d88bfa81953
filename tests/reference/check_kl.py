#!/usr/bin/env python3
"""gemma kl beside the same sums made here in float64, and what llama-perplexity calls them.

    python tests/reference/check_kl.py --build build/release --model FOLDER --work DIR
        [--llama FOLDER_OF_LLAMA_CPP_PROGRAMS --gguf BF16.gguf Q8_0.gguf]

`gemma kl save` writes the distributions of float32 eager over two windows of 512 tokens of
tests/golden/long_text.txt. Then each mode has three rows: what `gemma kl compare` says; the same
sums made here from the file's p; and from the p of transformers in float32, which shows what the
file's 16 bits lose. q are transformers' own for eager, and for the fused engine the logits that the
test program dump_logits takes from it. Fails where the mean KL of a fused mode is off by more than
1e-6 + 1 % of the second row, or 1e-6 + 3 % of the third.

With --llama, what llama-perplexity prints of the second GGUF against the first, beside the sums
made here from the logits it saves of both: its names mean what ours mean. Versions:
requirements.txt; llama.cpp as in README.md.
"""

import argparse
import json
import pathlib
import re
import sys

import numpy as np
import torch
from safetensors import safe_open

from common import transformers_model
from measure_quality import FIRST, GOLDEN, JUDGED, WINDOW, of_gemma, of_llama, read_windows, run

CHARACTERS = 5400
ROWS = 32
NAMES = ("kl", "median", "p99", "max", "same top %", "rms dp %", "ppl", "kl error")
MODES = {  # flags of gemma kl compare; quant and piece of dump_logits
    "bfloat16 eager": (["--engine", "eager"], None),
    "fused": (["--engine", "fused"], "none"),
    "fused int8": (["--engine", "fused", "--quant", "int8"], "int8"),
}


def gemma(program, *arguments):
    return json.loads(run(program, *arguments, "--json"))


@torch.no_grad()
def of_transformers(folder, windows, dtype):
    model = transformers_model(folder, dtype)
    for window in windows:
        hidden = model.model(window[None]).last_hidden_state[0, FIRST:-1]
        yield model.lm_head(hidden).float().log_softmax(-1)


class Saved:
    """Rows of the file of gemma kl save, decoded as its metadata says."""

    def __init__(self, path):
        with safe_open(path, "np") as file:
            self.codes = file.get_slice("codes")
            self.index = file.get_tensor("index")
            print("codes:", file.metadata()["codes"])
            shape = self.codes.get_shape()
        data = np.memmap(path, np.uint8, "r")
        length = int(data[:8].view(np.uint64)[0])
        begin, end = json.loads(bytes(data[8 : 8 + length]))["codes"]["data_offsets"]
        self.rows = data[8 + length + begin : 8 + length + end].view(np.uint16).reshape(shape)

    def window(self, n):
        rows = torch.from_numpy(self.rows[n * JUDGED : (n + 1) * JUDGED].astype(np.float32))
        return rows.div_(8192).square_().neg_().log_softmax(-1)


def normalized(log_p):
    """In float64: log_softmax of 262,144 float32 numbers is off by 2 parts in 100,000."""
    log_p = log_p.double()
    return log_p - log_p.logsumexp(-1, keepdim=True)


def figures(reference, other, windows):
    """Mean KL, its median, 99 % and most; same top; RMS difference of p; perplexities."""
    kl, same, p_next, q_next = [], [], [], []
    for window, log_p, log_q in zip(windows, reference, other, strict=True):
        parts = zip(*(x.split(ROWS) for x in (log_p, log_q, window[FIRST + 1 :])), strict=True)
        for p, q, token in parts:
            p, q = normalized(p), normalized(q)
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).double())
            p_next.append(p.gather(1, token[:, None])[:, 0])
            q_next.append(q.gather(1, token[:, None])[:, 0])
    kl, same, p, q = (torch.cat(x).numpy() for x in (kl, same, p_next, q_next))
    delta = np.exp(q) - np.exp(p)
    return {
        "kl": kl.mean(),
        "median": np.median(kl),
        "p99": np.quantile(kl, 0.99),
        "max": kl.max(),
        "same top %": 100 * same.mean(),
        "rms dp %": 100 * np.sqrt(np.square(delta).mean()),
        "ppl": np.exp(-q.mean()),
        "kl error": kl.std() / np.sqrt(len(kl) - 1),
    }


def of_ours(value):
    return {
        "kl": value["kl"]["mean"],
        "median": value["kl"]["median"],
        "p99": value["kl"]["p99"],
        "max": value["kl"]["max"],
        "same top %": 100 * value["same_top"]["value"],
        "rms dp %": 100 * value["rms_delta_p"]["value"],
        "ppl": value["perplexity"]["value"],
        "kl error": value["kl"]["error"],
    }


def show(name, row):
    print(f"{name:30}" + " ".join(f"{value:11.5g}" for value in row.values()), flush=True)


def check_modes(args, windows):
    program, saved = args.build / "gemma", args.work / "float32.safetensors"
    text = args.work / "ids.txt"
    flat = ",".join(map(str, windows.flatten().tolist()))
    threads = ["-t", args.threads]
    report = gemma(program, "kl", "save", "-m", args.model, "--ids", flat, "-o", saved,
                   "--dtype", "float32", "--engine", "eager", *threads)  # fmt: skip
    print(f"{report['positions']} positions, {report['bytes'] / report['positions']:.0f} bytes each")
    file = Saved(saved)
    true = list(of_transformers(args.model, windows, torch.float32))
    print(f"{'':30}" + " ".join(f"{key:>11}" for key in NAMES))
    failed = []
    from_file = [file.window(n) for n in range(len(windows))]
    show("file, against transformers", figures(true, from_file, windows))
    text.write_text("".join(" ".join(map(str, w)) + "\n" for w in windows.tolist()))
    modes = {"float32 eager": (["--engine", "eager", "--dtype", "float32"], "transformers")} | MODES
    for name, (flags, source) in modes.items():
        value = of_ours(gemma(program, "kl", "compare", saved, "-m", args.model, *flags, *threads))
        show(f"{name}: gemma kl", value)
        if source == "transformers":
            other = true
        elif source is None:
            other = list(of_transformers(args.model, windows, torch.bfloat16))
        else:
            dump = args.build / "tests" / "dump_logits"
            other = list(of_gemma(dump, args.model, source, text, ROWS, []))
        with_file = figures(from_file, other, windows)
        with_true = figures(true, other, windows)
        show(f"{name}: here, file", with_file)
        show(f"{name}: here, true", with_true)
        if source in ("none", "int8"):  # the same engine's logits
            for want, share in ((with_file["kl"], 0.01), (with_true["kl"], 0.03)):
                if abs(value["kl"] - want) > 1e-6 + share * want:
                    failed.append(name)
    return failed


# llama-perplexity's words for them, from its table at the end.
LLAMA = {
    "kl": r"Mean +KLD: +(\S+)",
    "median": r"Median +KLD: +(\S+)",
    "p99": r"99\.0% +KLD: +(\S+)",
    "max": r"Maximum +KLD: +(\S+)",
    "same top %": r"Same top p: +(\S+)",
    "rms dp %": r"RMS Δp +: +(\S+)",
    "ppl": r"Mean PPL\(Q\) +: +(\S+)",
    "kl error": r"Mean +KLD: +\S+ ± +(\S+)",
}


def check_llama(args, text, windows):
    program, base = args.llama / "llama-perplexity", args.work / "llama.logits"
    first, second = args.gguf
    common = ["-f", text, "-c", WINDOW, "-b", WINDOW, "-t", args.threads]
    p = list(of_llama(program, first, text, windows, args.work / "first.logits"))
    q = list(of_llama(program, second, text, windows, args.work / "second.logits"))
    run(program, "-m", first, *common, "--kl-divergence-base", base)
    said = run(program, "-m", second, *common, "--kl-divergence-base", base, "--kl-divergence")
    base.unlink()
    show("llama.cpp: it says", {key: float(re.search(x, said)[1]) for key, x in LLAMA.items()})
    show("llama.cpp: here", figures(p, q, windows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=pathlib.Path, required=True, help="folder of gemma")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="HF folder, bfloat16")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="300 MB are kept here")
    parser.add_argument("--llama", type=pathlib.Path, help="folder of llama-perplexity")
    parser.add_argument("--gguf", type=pathlib.Path, nargs=2, help="two models, as for --llama")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "text.txt"
    text.write_text((GOLDEN / "long_text.txt").read_text()[:CHARACTERS])
    windows = read_windows(args.build / "gemma", args.model, text)
    windows[:, 0] = 2
    failed = check_modes(args, windows)
    if args.llama:
        check_llama(args, text, windows)
    if failed:
        sys.exit(f"sums that differ: {', '.join(failed)}")


if __name__ == "__main__":
    main()
