#!/usr/bin/env python3
"""gemma sae beside PyTorch: features, reconstruction, edited text, in float32 on the CPU.

    python tests/reference/check_sae.py --gemma build/release/gemma --model FOLDER [--steps 300]

No published autoencoder is at hand: three are made here. `random` has random weights and a
threshold that some 1 % of the features pass; `trained` is fitted for --steps steps to the values
of tests/golden/long_text.txt, enough for a reconstruction that means something; `transcoder` is
random, from mlp_in to mlp_out, with a skip connection, in Gemma Scope 2's spelling. Each is
applied to the values that forward hooks in transformers see, and once more from a .npz file.
Fails where a difference is above what is written below. Versions: requirements.txt.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import save_file

from common import transformers_model

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
LAYER, WIDTH, FEATURES = 9, 640, 4096
PROMPT = "The old lighthouse keeper wrote in his diary every night, because"
ACTIVATION_ALLOWED = 1e-4  # of the largest activation
LOSS_ALLOWED = 1e-4  # nats a token


def gemma(args, what, tensors, sites, *more):
    command = [args.gemma, "sae", what, "--sae", tensors, *sites, "-m", args.model]
    command += ["--dtype", "float32", "-t", args.threads, *more, "--json"]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def ids_of(args, *text):
    command = [args.gemma, "tokenize", "-m", args.model, *map(str, text), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["ids"]


class Autoencoder:
    """The definition, in PyTorch."""

    def __init__(self, tensors, input_site, output_site):
        self.t, self.sites = tensors, (input_site, output_site)

    def flags(self):
        names = [f"blocks.{LAYER}.{site}" for site in self.sites]
        if names[0] == names[1]:
            return ("--site", names[0])
        return ("--input-site", names[0], "--output-site", names[1])

    def encode(self, x):
        p = x @ self.t["W_enc"] + self.t["b_enc"]
        return torch.relu(p) * (p > self.t["threshold"])

    def output(self, x):
        out = self.encode(x) @ self.t["W_dec"] + self.t["b_dec"]
        return out + x @ self.t["W_skip"] if "W_skip" in self.t else out


def modules(model):
    block = model.model.layers[LAYER]
    return {
        "resid_post": block,
        "mlp_in": block.pre_feedforward_layernorm,
        "mlp_out": block.post_feedforward_layernorm,
    }


def hooked(model, sae, act):
    """Hooks that put act(x, y) in the output site's place, x being the input site's value."""
    kept = {}

    def look(_module, _args, output):
        kept["x"] = output if torch.is_tensor(output) else output[0]

    def put(_module, _args, output):
        whole = output if torch.is_tensor(output) else output[0]
        changed = act(kept["x"], whole)
        return changed if torch.is_tensor(output) else (changed, *output[1:])

    at = modules(model)
    return [
        at[sae.sites[0]].register_forward_hook(look),
        at[sae.sites[1]].register_forward_hook(put),
    ]


@torch.no_grad()
def run(model, ids, sae=None, act=None):
    handles = hooked(model, sae, act) if sae else []
    try:
        return model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def values(model, ids, sae):
    found = []
    run(model, ids, sae, lambda x, y: found.extend([x[0], y[0]]) or y)
    return found


def loss(logits, ids):
    p = logits[:-1].double().log_softmax(-1)
    return -p.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()


def random_autoencoder(x, outputs, skip):
    """Weights at random, and a threshold that about 1 % of the features pass on the rows x."""
    draw = torch.Generator().manual_seed(1)
    t = {
        "W_enc": torch.randn(x.shape[1], FEATURES, generator=draw) / x.shape[1] ** 0.5,
        "W_dec": torch.randn(FEATURES, outputs, generator=draw) / FEATURES**0.5,
        "b_enc": torch.randn(FEATURES, generator=draw),
        "b_dec": torch.randn(outputs, generator=draw),
    }
    if skip:
        t["W_skip"] = torch.randn(x.shape[1], outputs, generator=draw) / x.shape[1] ** 0.5
    t["threshold"] = (x @ t["W_enc"] + t["b_enc"]).quantile(0.99, dim=0)
    return t


def trained_autoencoder(x, steps):
    """ReLU and an L1 penalty by Adam, on rows x scaled to length 1 on average; then a threshold."""
    scale = x.norm(dim=1).median()
    x = x / scale
    t = {name: v / 20 for name, v in random_autoencoder(x, x.shape[1], False).items()}
    t["W_dec"] = t["W_enc"].T.clone() / t["W_enc"].norm(dim=0)[:, None]
    t["b_enc"], t["b_dec"] = torch.zeros(FEATURES), x.mean(0)
    weights = [t[name].requires_grad_() for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
    adam = torch.optim.Adam(weights, lr=1e-3)
    draw = torch.Generator().manual_seed(2)
    for _ in range(steps):
        some = x[torch.randint(len(x), (512,), generator=draw)]
        features = torch.relu(some @ t["W_enc"] + t["b_enc"])
        missed = (features @ t["W_dec"] + t["b_dec"] - some).square().sum(1).mean()
        penalty = (features * t["W_dec"].norm(dim=1)).sum(1).mean()
        adam.zero_grad()
        (missed + 0.01 * penalty).backward()
        adam.step()
    t = {name: v.detach() for name, v in t.items()}
    t["threshold"] = torch.full((FEATURES,), 0.002 * scale)
    t["b_enc"], t["b_dec"] = t["b_enc"] * scale, t["b_dec"] * scale
    return t


def check_encoding(args, model, sae, files):
    ids = ids_of(args, "-p", PROMPT)
    x, y = values(model, ids, sae)
    want = sae.encode(x)
    asked = want.max(0).values.topk(8).indices.tolist()
    feature = ("--feature", ",".join(map(str, asked)), "--top", 20, "-p", PROMPT)
    worst = 0
    for file in files:
        ours = gemma(args, "encode", file, sae.flags(), *feature)
        got = torch.tensor([row["activations"] for row in ours["features"]]).T
        worst = max(worst, ((got - want[:, asked]).abs().max() / want.max()).item())
        for token, top in enumerate(ours["top"]):
            listed = torch.tensor([row["activation"] for row in top])
            best = want[token].topk(len(top)).values
            worst = max(worst, ((listed - best).abs().max() / want.max()).item() if top else 0)
    missed = (y - sae.output(x)).square().sum() / (y - y.mean(0)).square().sum()
    explained = abs(ours["explained"] - (1 - missed.item()))
    l0 = abs(ours["l0"] - (want > 0).sum(1).float().mean().item())
    return worst, ours["l0"], ours["explained"], max(l0 / 50, explained)


def check_loss(args, model, sae, file):
    lines = (GOLDEN / "long_text.txt").read_text(encoding="utf-8")[:1500]
    ids = ids_of(args, "-p", lines)
    ours = gemma(args, "reconstruct", file, sae.flags(), "-p", lines)
    theirs = [
        loss(run(model, ids), ids),
        loss(run(model, ids, sae, lambda x, _: sae.output(x)), ids),
        loss(run(model, ids, sae, lambda _, y: torch.zeros_like(y)), ids),
    ]
    names = ("nll", "nll_reconstructed", "nll_zeroed")
    return ours, max(abs(ours[name] - want) for name, want in zip(names, theirs))


def check_text(args, model, sae, file):
    """Greedy text with the most active feature ablated and another one clamped."""
    ids = ids_of(args, "-p", PROMPT)
    active = sae.encode(values(model, ids, sae)[0])[1:].max(0).values.topk(2)  # not at BOS
    off, on = active.indices.tolist()
    value = 2 * active.values[0].item()
    more = ("-p", PROMPT, "-n", 16, "--greedy", "--ablate", off, "--clamp", f"{on}={value}")
    ours = gemma(args, "generate", file, sae.flags(), *more)

    def edit(x, y):
        act = sae.encode(x)
        w = sae.t["W_dec"]
        return y - act[..., off, None] * w[off] + (value - act[..., on, None]) * w[on]

    for _ in ours["ids"]:
        ids.append(run(model, ids, sae, edit)[-1].argmax().item())
    return ids[-len(ours["ids"]) :] == ours["ids"]


def autoencoders(args, model):
    ids = ids_of(args, "-f", GOLDEN / "long_text.txt")[:2048]
    plain = Autoencoder({}, "resid_post", "resid_post")
    coder = Autoencoder({}, "mlp_in", "mlp_out")
    x = values(model, ids, plain)[0][1:]  # BOS is like no other token
    yield "random", Autoencoder(random_autoencoder(x, WIDTH, False), "resid_post", "resid_post")
    yield "trained", Autoencoder(trained_autoencoder(x, args.steps), "resid_post", "resid_post")
    x = values(model, ids, coder)[0][1:]
    yield "transcoder", Autoencoder(random_autoencoder(x, WIDTH, True), "mlp_in", "mlp_out")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", required=True, help="the program")
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=300, help="of the trained one")
    parser.add_argument("--keep", help="folder for the trained one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = transformers_model(args.model, torch.float32, attention="eager")
    names = "l0, explained, activations, loss, with output, with zeros, losses, text".split(", ")
    print("| autoencoder | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    good = True
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, sae in autoencoders(args, model):
            spelling = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
            if name != "transcoder":
                spelling = {}
            tensors = {spelling.get(key, key): t.contiguous() for key, t in sae.t.items()}
            file, archive = folder / f"{name}.safetensors", folder / f"{name}.npz"
            save_file(tensors, file)
            if args.keep and name == "trained":
                save_file(tensors, pathlib.Path(args.keep) / "trained.safetensors")
            np.savez(archive, **{key: t.numpy() for key, t in tensors.items()})
            worst, l0, explained, fit = check_encoding(args, model, sae, (file, archive))
            ours, losses = check_loss(args, model, sae, file)
            same = check_text(args, model, sae, file)
            print(
                f"| {name} | {l0:.1f} | {explained:.3f} | {worst:.2g} | {ours['nll']:.4f} | "
                f"{ours['nll_reconstructed']:.4f} | {ours['nll_zeroed']:.4f} | {losses:.2g} | "
                f"{'equal' if same else 'DIFFERS'} |",
                flush=True,
            )
            fine = worst <= ACTIVATION_ALLOWED and losses <= LOSS_ALLOWED and same
            good = good and fine and fit <= 1e-3
    sys.exit(not good)


if __name__ == "__main__":
    main()
