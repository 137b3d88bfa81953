#!/usr/bin/env python3
"""How far the quantised modes are from transformers float32, beside llama.cpp's formats.

    python tests/reference/measure_quality.py --build build/release --model HF_FOLDER --work DIR
        [--llama FOLDER_OF_LLAMA_CPP_PROGRAMS --gguf BF16.gguf] [--dither SEED] [--piece 512]
        [--modes exact,int8,mixed6,mixed5,mixed4] [--formats BF16,Q8_0,Q4_0]

The text is the start of tests/golden/long_text.txt (English prose), then mixed_text.txt (eight
other languages, code, numbers; written for this). No mode has seen it: the mixed ones are
calibrated on what the model writes itself.
It is read in windows of 512 tokens, BOS over the first of each, and the last 255 predictions of
each window are judged: llama-perplexity's own rule, so that all columns stand on the same
positions. Against transformers float32 (eager), each row has
KL        mean of sum p (ln p - ln q) in nats, p of float32
same top  share of positions with the same most probable token
ppl       perplexity
MB        what a token reads, layers and head

llama.cpp gives its numbers only as llama-perplexity saves them: in 16 bits, and whatever is below
the best by more than 16 as one value. Its rows are KL from float32 coded alike, and so are those
named "coded" of the two modes that are held against them.

--dither SEED judges another model: every weight of the layers and of the embedding is moved by
noise within half a step of the grid that it seems to lie on. The default weights were once Q4_K_M,
and a format on that very grid would look better with them than with weights that never were.
Noise is uniform; the step is the least distance of two different weights in 16 neighbours, which
for weights that lie on no grid is next to nothing.

What takes long (quantised folders, GGUF files) is kept in DIR and used again. Without --llama its
rows are left out. Takes 6 GB of memory. Versions: requirements.txt; llama.cpp as in README.md.
"""

import argparse
import json
import pathlib
import shutil
import subprocess

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from common import transformers_model

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
PROSE_CHARACTERS = 5400
WINDOW, BOS = 512, 2
FIRST = WINDOW // 2  # the first position whose prediction is judged
JUDGED = WINDOW - 1 - FIRST
ROWS = 4  # positions at once: their (ROWS, V) numbers stay in the cache
GRID = 16  # neighbours that are searched for the grid's step

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def once(path, make):
    """Makes `path` by make(temporary path) unless it is there."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        if partial.is_dir():
            shutil.rmtree(partial)
        make(partial)
        partial.rename(path)
    return path


def read_windows(gemma, model, text):
    ids = json.loads(run(gemma, "tokenize", "-m", model, "-f", text, "--json"))["ids"]
    count = len(ids) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


# ---- weights off their old grid


def dithered(weight, generator):
    groups = weight.float().reshape(-1, GRID)
    ordered = groups.sort(dim=1).values
    gaps = ordered.diff(dim=1)
    # Values of one level may differ by nothing else than their rounding to bfloat16.
    gaps[gaps <= ordered.abs().amax(dim=1, keepdim=True) / 256] = torch.inf
    step = gaps.amin(dim=1, keepdim=True)
    step[step.isinf()] = 0.0
    noise = torch.rand(groups.shape, generator=generator) - 0.5
    return (groups + noise * step).reshape(weight.shape).bfloat16()


def is_matrix(name):
    return "proj.weight" in name or name == "model.embed_tokens.weight"


def write_dithered(source, seed, out):
    out.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, out)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(filter(is_matrix, tensors)):
        tensors[name] = dithered(tensors[name], generator)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(folder, like, out):
    """A copy of the bfloat16 file `like` with the matrices of an HF folder."""
    shutil.copy(like, out)
    places = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out, "r+").tensors}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not is_matrix(name):
            continue
        place = places[gguf_name(name)]
        value = weight.contiguous().view(torch.uint8).numpy()
        if place.dtype != np.uint8 or place.shape != value.shape:
            raise SystemExit(
                f"{like}: {gguf_name(name)}: expected bfloat16 of {tuple(weight.shape)}, got "
                f"{place.dtype} {place.shape}"
            )
        place[:] = value
    next(iter(places.values())).base.flush()


def gguf_megabytes(path):
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors) / 1e6


# ---- predictions: generators of (JUDGED, V) logarithms of probabilities, window by window


@torch.no_grad()
def of_transformers(folder, windows, dtype, attention):
    model = transformers_model(folder, dtype, attention)
    for window in windows:
        hidden = model.model(window[None]).last_hidden_state[0, FIRST:-1]
        yield model.lm_head(hidden).float().log_softmax(-1)


def of_gemma(program, folder, quant, ids, piece, sizes):
    command = [program, folder, ids, FIRST, quant, piece]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        buffer = bytearray(JUDGED * vocabulary * 4)
        while process.stdout.readinto(memoryview(buffer)[:1]):
            done = 1
            while done < len(buffer) and (n := process.stdout.readinto(memoryview(buffer)[done:])):
                done += n
            logits = torch.frombuffer(buffer, dtype=torch.float32).view(JUDGED, vocabulary)
            yield logits.log_softmax(-1)
        message = process.stderr.read().decode()
    if process.returncode != 0:
        raise SystemExit(message)
    sizes.append(int(message) / 1e6)


def of_llama(program, model, text, windows, saved):
    run(program, "-m", model, "-f", text, "-c", WINDOW, "-b", WINDOW, "--save-all-logits", saved)
    with open(saved, "rb") as file:
        if file.read(8) != b"_logits_":
            raise SystemExit(f"{saved}: expected to begin with _logits_")
        context, vocabulary, count = np.fromfile(file, np.int32, 3).tolist()
        ids = torch.from_numpy(np.fromfile(file, np.int32, context * count)).view(count, context)
        if ids.shape != windows.shape or not torch.equal(ids[:, 1:].long(), windows[:, 1:]):
            raise SystemExit(f"{model}: its tokenizer gives other ids than ours for {text}")
        width = 2 * ((vocabulary + 1) // 2) + 4
        for _ in range(count):
            rows = np.fromfile(file, np.uint16, JUDGED * width).reshape(JUDGED, width)
            scale, least = torch.from_numpy(rows[:, :4].copy().view(np.float32)).split(1, dim=1)
            codes = torch.from_numpy(rows[:, 4 : 4 + vocabulary].astype(np.float32))
            yield codes.mul_(scale).add_(least).log_softmax(-1)
    pathlib.Path(saved).unlink()


def coded(log_p):
    """What is left of logarithms of probabilities in llama-perplexity's file, made to sum to 1."""
    result = torch.empty_like(log_p)
    for out, x in zip(result.split(ROWS), log_p.split(ROWS), strict=True):
        best = x.amax(dim=-1, keepdim=True)
        least = torch.maximum(x.amin(dim=-1, keepdim=True), best - 16)
        scale = (best - least) / 65535
        codes = (x - least).div_(scale).clamp_(min=0).round_()
        out[:] = codes.mul_(scale).add_(least).log_softmax(-1)
    return result


# ---- the table


def judge(reference, predictions, windows):
    """Means over all positions: KL, same top; and the perplexity."""
    kl = nll = same = 0.0
    for whole_p, whole_q, window in zip(reference, predictions, windows, strict=True):
        wanted = window[FIRST + 1 :, None]
        rows = zip(whole_p.split(ROWS), whole_q.split(ROWS), wanted.split(ROWS), strict=True)
        for log_p, log_q, token in rows:
            kl += (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum().item()
            same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            nll -= log_q.gather(1, token).double().sum().item()
    count = len(windows) * JUDGED
    return kl / count, same / count, np.exp(nll / count)


def show(name, figures, megabytes):
    kl, same, perplexity = figures
    size = f"{megabytes:6.0f}" if megabytes else ""
    print(f"{name:28} {kl:9.5f} {100 * same:8.2f} % {perplexity:9.3f} {size}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=pathlib.Path, required=True, help="folder of gemma")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="HF folder, bfloat16")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="5 GB are kept here")
    parser.add_argument("--llama", type=pathlib.Path, help="folder of llama-perplexity, -quantize")
    parser.add_argument("--gguf", type=pathlib.Path, help="the same weights as a BF16 GGUF")
    parser.add_argument("--dither", type=int, help="seed of the noise; absent: none")
    parser.add_argument("--piece", type=int, default=WINDOW, help="tokens gemma reads at a time")
    parser.add_argument("--modes", default="exact,int8,mixed6,mixed5,mixed4")
    parser.add_argument("--formats", default="BF16,Q8_0,Q4_0")
    args = parser.parse_args()
    if (args.llama is None) != (args.gguf is None):
        parser.error("--llama and --gguf: expected both or none, got one")
    work = args.work / ("plain" if args.dither is None else f"dither{args.dither}")
    work.mkdir(parents=True, exist_ok=True)
    gemma, dump = args.build / "gemma", args.build / "tests" / "dump_logits"
    model = args.model
    if args.dither is not None:
        model = once(work / "model", lambda out: write_dithered(args.model, args.dither, out))

    text = work / "text.txt"
    prose, mixed = ((GOLDEN / name).read_text() for name in ("long_text.txt", "mixed_text.txt"))
    text.write_text(prose[:PROSE_CHARACTERS] + "\n\n" + mixed)
    windows = read_windows(gemma, model, text)
    windows[:, 0] = BOS
    ids = work / "windows.txt"
    ids.write_text("".join(" ".join(map(str, window)) + "\n" for window in windows.tolist()))
    print(f"{len(windows)} windows, {len(windows) * JUDGED} positions judged")
    print(f"{'':28} {'KL':>9} {'same top':>10} {'ppl':>9} {'MB':>6}")

    reference = list(of_transformers(model, windows, torch.float32, "eager"))
    show("transformers float32", judge(reference, reference, windows), None)
    own = of_transformers(model, windows, torch.bfloat16, "sdpa")
    show("transformers bfloat16, sdpa", judge(reference, own, windows), None)
    reference_coded = [coded(log_p) for log_p in reference] if args.llama else None

    for mode in filter(None, args.modes.split(",")):
        folder = model
        if mode.startswith("mixed"):
            folder = once(
                work / mode,
                lambda out, mode=mode: run(
                    gemma, "quantize", "-m", model, "--quant", mode, "--out", out
                ),
            )
        quant, sizes = "int8" if mode == "int8" else "none", []
        predictions = of_gemma(dump, folder, quant, ids, args.piece, sizes)
        show(f"gemma {mode}", judge(reference, predictions, windows), sizes[0])
        if reference_coded and mode in ("int8", "mixed4"):
            predictions = map(coded, of_gemma(dump, folder, quant, ids, args.piece, []))
            show(f"gemma {mode}, coded", judge(reference_coded, predictions, windows), sizes[0])

    for kind in filter(None, args.formats.split(",") if args.llama else ()):
        base = once(work / "BF16.gguf", lambda out: write_gguf(model, args.gguf, out))
        file = base
        if kind != "BF16":
            quantize = args.llama / "llama-quantize"
            file = once(
                work / f"{kind}.gguf", lambda out, kind=kind: run(quantize, base, out, kind)
            )
        saved = work / "logits"
        predictions = of_llama(args.llama / "llama-perplexity", file, text, windows, saved)
        figures = judge(reference_coded, predictions, windows)
        show(f"llama.cpp {kind}", figures, gguf_megabytes(file))


if __name__ == "__main__":
    main()
