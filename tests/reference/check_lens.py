#!/usr/bin/env python3
"""gemma lens, attribute and saliency beside the same numbers from transformers and autograd.

    python tests/reference/check_lens.py --gemma build/release/gemma --model FOLDER

In float32 on the CPU, for four prompts: the lens from transformers' hidden_states, its norm and its
head; attribution by calling o_proj and down_proj on one head or one neuron at a time; gradients by
autograd at inputs_embeds, in float64; then how complete integrated gradients are, by transformers' values at
both ends of the path. Prints largest differences, and fails where one is larger than is allowed
below. Versions: requirements.txt.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file

from common import transformers_model
from sites import transformers_sites

PROMPTS = {
    "fact": "The capital of France is",
    "story": "When Mary and John went to the store, John gave a drink to",
    "code": "def fib(n):\n    return n if n < 2 else fib(n - 1) +",
    "prose": "Our trip to Paris was lovely. Everyone there speaks the same language, and although "
    "we had learned a little of it before, most of what people said to us in the street was",
}
TOP = 20
NEURONS = 40
ALLOWED = {
    "lens, logits": 2e-3,
    "lens, log-probabilities": 2e-3,
    "lens, KL": 2e-3,
    "lens, last layer's logits": 1e-3,
    "attribution, sum less the logit": 1e-3,
    "attribution, logit": 1e-3,
    "attribution, parts": 1e-3,
    "attribution, neurons": 1e-3,
    "gradient, of its largest": 1e-4,
    "gradient x input, of both sizes": 1e-4,
    "saliency, value": 1e-3,
    "integrated, completeness": 0.01,
}


class Check:
    """Runs gemma on a prompt, and keeps the largest difference of each kind."""

    def __init__(self, args):
        self.command = [args.gemma, "-m", args.model, "--dtype", "float32", "-t", args.threads]
        self.found = {}

    def gemma(self, name, *more):
        gemma, *model = self.command
        words = [gemma, name, *model, *more, "--json"]
        done = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(done.stdout)

    def note(self, kind, prompt, difference):
        difference = float(difference)
        old = self.found.get(kind, (0.0, prompt, 0))
        self.found[kind] = max(old[:2], (difference, prompt)) + (old[2] + 1,)

    def print(self):
        print("| what | compared | largest difference | prompt | allowed |\n|---|---|---|---|---|")
        for kind, (difference, prompt, count) in self.found.items():
            print(f"| {kind} | {count} | {difference:.2g} | {prompt} | {ALLOWED[kind]:.2g} |")
        return all(difference <= ALLOWED[kind] for kind, (difference, *_) in self.found.items())


@torch.no_grad()
def check_lens(check, model, name, ids, lens):
    output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    states = [state[0] for state in output.hidden_states]
    last = output.logits[0]
    final = last.log_softmax(-1).double()
    ranks = 0
    for depth in range(len(lens["depths"])):
        is_last = depth == len(lens["depths"]) - 1  # transformers has normalised that one already
        logits = last if is_last else model.lm_head(model.model.norm(states[depth]))
        log_probs = logits.log_softmax(-1)
        top = torch.tensor(lens["top_ids"][depth])
        ours = torch.tensor(lens["top_logits"][depth])
        difference = (ours - logits.gather(-1, top)).abs().max()
        check.note("lens, last layer's logits" if is_last else "lens, logits", name, difference)
        ours = torch.tensor(lens["top_logprobs"][depth])
        difference = (ours - log_probs.gather(-1, top)).abs().max()
        check.note("lens, log-probabilities", name, difference)
        kl = (final.exp() * (final - log_probs.double())).sum(-1)
        difference = (torch.tensor(lens["kl"][depth], dtype=torch.double) - kl).abs().max()
        check.note("lens, KL", name, difference)
        for position, target in enumerate(ids[1:]):
            ours = lens["target_logprobs"][depth][position][0]
            check.note("lens, log-probabilities", name, abs(ours - log_probs[position, target]))
            rank = 1 + (logits[position] > logits[position, target]).sum().item()
            ranks += rank != lens["target_ranks"][depth][position][0]
    return ranks, (len(ids) - 1) * len(lens["depths"])


def norm_scale(norm, x):
    """What a norm multiplies each channel of x by."""
    return (1 + norm.weight) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)


@torch.no_grad()
def check_attribution(check, model, name, ids, found):
    sites = transformers_sites(model, torch.tensor([ids]))
    position = found["position"]
    heads = model.config.num_attention_heads
    at = {key: value[0, position] for key, value in sites.items() if value.dim() < 4 or ".z" in key}
    last = at[f"blocks.{len(model.model.layers) - 1}.resid_post"]
    rows = [model.lm_head.weight[token["id"]] for token in found["tokens"]]
    unembed = rows[0] - rows[1] if len(rows) == 2 else rows[0]

    def logit(part):
        return ((part * norm_scale(model.model.norm, last)).double() @ unembed.double()).item()

    logits = [at["logits"][token["id"]].item() for token in found["tokens"]]
    value = logits[0] - logits[1] if len(logits) == 2 else logits[0]
    check.note("attribution, logit", name, abs(found["value"] - value))
    check.note("attribution, sum less the logit", name, abs(found["sum"] - value))
    check.note("attribution, parts", name, abs(found["embed"] - logit(at["embed"])))
    neurons = torch.tensor(found["neurons"])
    _, largest = neurons.abs().flatten().topk(NEURONS)
    chosen = [divmod(i, neurons.shape[1]) for i in largest.tolist()]
    for n, layer in enumerate(model.model.layers):
        attention = norm_scale(layer.post_attention_layernorm, at[f"blocks.{n}.attn_proj"])
        for head in range(heads):
            one = torch.zeros_like(at[f"blocks.{n}.z"])
            one[head] = at[f"blocks.{n}.z"][head]
            want = logit(layer.self_attn.o_proj(one.flatten()) * attention)
            check.note("attribution, parts", name, abs(found["heads"][n][head] - want))
        want = logit(at[f"blocks.{n}.mlp_out"])
        check.note("attribution, parts", name, abs(found["mlp"][n] - want))
        feed_forward = norm_scale(layer.post_feedforward_layernorm, at[f"blocks.{n}.mlp_proj"])
        for neuron in (neuron for where, neuron in chosen if where == n):
            one = torch.zeros_like(at[f"blocks.{n}.mlp_act"])
            one[neuron] = at[f"blocks.{n}.mlp_act"][neuron]
            want = logit(layer.mlp.down_proj(one) * feed_forward)
            check.note("attribution, neurons", name, abs(found["neurons"][n][neuron] - want))


def target_value(model, embeds, ids, found):
    """The explained number, of embeddings (1, T, E) as embed_tokens gives them (scaled)."""
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
    if found["of"] == "loss":
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    row = logits[found["position"]]
    row = row.log_softmax(-1) if found["of"] == "logprob" else row
    first, *second = (row[token["id"]] for token in found["tokens"])
    return first - second[0] if second else first


def check_gradient(check, model, name, ids, found, file):
    embeds = model.model.embed_tokens(torch.tensor([ids])).detach().requires_grad_()
    value = target_value(model, embeds, ids, found)
    (want,) = torch.autograd.grad(value, embeds)
    difference = (load_file(file)["gradient"].double() - want[0]).abs().max() / want.abs().max()
    check.note("gradient, of its largest", name, difference)
    check.note("saliency, value", name, abs(found["value"] - value.item()))
    scores = (want * embeds).sum(-1)[0]
    sizes = (want.norm(dim=-1) * embeds.norm(dim=-1)).max()  # the products nearly cancel
    difference = (torch.tensor(found["scores"], dtype=torch.float64) - scores).abs().max() / sizes
    check.note("gradient x input, of both sizes", name, difference.detach())


@torch.no_grad()
def check_integrated(check, model, name, ids, found):
    embeds = model.model.embed_tokens(torch.tensor([ids]))
    baseline = {
        "pad": model.model.embed_tokens(torch.tensor([[0]])),
        "zero": torch.zeros(1, 1, embeds.shape[-1]),
        "mean": model.lm_head.weight.mean(0) * embeds.shape[-1] ** 0.5,
    }[found["baseline"]]
    start = baseline.expand_as(embeds).clone()
    start[:, 0] = embeds[:, 0]
    ends = [target_value(model, x, ids, found).item() for x in (start, embeds)]
    whole = ends[1] - ends[0]
    error = abs(sum(found["scores"]) - whole) / abs(whole)
    check.note("saliency, value", name, abs(found["value"] - ends[1]))
    check.note("integrated, completeness", name, error)
    shown = f"{found['steps']:>5} gradients, {100 * error:.3f} % off, {whole:.3f} to explain"
    print(
        f"{name:<6} {found['of']:<8} {found['baseline']:<5} {len(ids):>3} tokens {shown}",
        flush=True,
    )


def targets_of(lens):
    """Flags of what saliency explains: the likeliest next token, alone and beside the second."""
    best, second = lens["top_ids"][-1][-1][:2]
    both = ("--token-ids", f"{best},{second}")
    return ("--of", "logit"), ("--of", "logit", *both), ("--of", "logprob"), ("--of", "loss")


def check_direct(check, model, name, folder):
    """All but integrated gradients; the lens, and how many ranks of how many differ."""
    run = ("-p", PROMPTS[name])
    lens = check.gemma("lens", *run, "--top", TOP)
    ids = lens["ids"]
    ranks = check_lens(check, model, name, ids, lens)
    best, second = lens["top_ids"][-1][-1][:2]
    for tokens in (f"{best}", f"{best},{second}"):
        for position in (-1, len(ids) // 2):
            more = ("--token-ids", tokens, "--pos", position)
            check_attribution(check, model, name, ids, check.gemma("attribute", *run, *more))
    file = folder / "x.safetensors"
    for target in targets_of(lens):
        found = check.gemma("saliency", *run, *target, "--method", "gradient", "-o", file)
        check_gradient(check, check.wide, name, ids, found, file)
    return lens, ranks


def check_paths(check, model, name, lens):
    """Integrated gradients of every target, and of one from other baselines."""
    baselines = [("--baseline", baseline) for baseline in ("mean", "zero")]
    for more in (*targets_of(lens), *baselines):
        found = check.gemma("saliency", "-p", PROMPTS[name], *more)
        check_integrated(check, model, name, lens["ids"], found)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", required=True, help="the program")
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = transformers_model(args.model, torch.float32)
    model.requires_grad_(False)
    check = Check(args)
    check.wide = transformers_model(args.model, torch.float64)  # gradients: float32 is off itself
    check.wide.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        direct = {n: check_direct(check, model, n, pathlib.Path(folder)) for n in args.prompts}
    wrong, ranks = (sum(counts) for counts in zip(*(found for _, found in direct.values())))
    check.print()
    print(f"{wrong} of {ranks} ranks of the next token differ (near ties)\n", flush=True)
    for name, (lens, _) in direct.items():
        check_paths(check, model, name, lens)
    sys.exit(not check.print())


if __name__ == "__main__":
    main()
