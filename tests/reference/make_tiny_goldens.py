#!/usr/bin/env python3
"""Makes the goldens of random tiny models and of the sampler, in tests/golden.

    python tests/reference/make_tiny_goldens.py [--notebooks FOLDER] [--out tests/golden]

tiny_grouped.safetensors    tied head, 2 KV groups, window 8, layer kinds in no fixed pattern
tiny_scaled.safetensors     separate head, 1 KV group, window 5, linear rope scaling on full layers
    metadata `config`: HF config.json text, the first in the old rope spelling, the second in the
    new. HF weight names (float32); ids (B, T), logits, embed, blocks.N.resid_post, final_norm;
    loss (mean cross-entropy of the next token) and grad.<weight name>; greedy (B, 24), the new ids
    of generate(); bf16.logits, all bfloat16, of the weights rounded to it; padded.ids,
    padded.first (B) = left padding, padded.logits with zeros at padded positions.
tiny_sites.safetensors      tiny_scaled as dump_parity.py dumps it: every site of two layers
sampling.json               what generate()'s own chain of processors leaves of a distribution
With --notebooks, the folder of the two reference notebooks:
notebook_init.safetensors   a tiny notebook model after manual_seed(123): eight values a parameter
notebook_quick_check.json   cell 19 of both notebooks (270M, bfloat16, seed 123): the values
    computed here, and those saved in the notebooks by another machine and torch version
Versions: requirements.txt.
"""

import argparse
import copy
import json
import pathlib
import re

import torch
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

from common import NOTEBOOK_SOURCE, notebook_namespace, provenance, save_json, save_tensors
from sites import transformers_sites

BASE = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 101,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = BASE | {
    "hidden_size": 20,  # not heads * head_dim = 32
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
    + ["sliding_attention", "full_attention"],
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 3,  # not head_dim
    "sliding_window": 8,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 50.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SCALED = BASE | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 5,
    "sliding_window": 5,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 200.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
    "tie_word_embeddings": False,
    "dtype": "float32",
}
B, T, NEW = 2, 21, 24


def empty_model(config, dtype):
    """Built in its dtype, since .to(bfloat16) would round the rotary frequencies too."""
    return Gemma3ForCausalLM._from_config(
        Gemma3TextConfig(**config), attn_implementation="eager", dtype=dtype
    ).eval()


def random_model(config, seed):
    """Weights large enough that attention is peaked and every norm's scale matters."""
    torch.manual_seed(seed)
    model = empty_model(config, torch.float32)
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_projection = x.dim() == 2 and "embed" not in name
            x.normal_(std=1.3 * x.shape[-1] ** -0.5 if is_projection else 0.3)
    return model


def gradients(model, ids):
    logits = model(ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same = model(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, same)  # what a user of transformers would get
    model.zero_grad()
    loss.backward()
    grads = {f"grad.{name}": x.grad for name, x in model.named_parameters()}
    refuse_ill_conditioned(model, ids, grads)
    return loss, grads


def refuse_ill_conditioned(model, ids, grads):
    """A golden must not itself be near the tolerance (1e-5) that it is to hold others to."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    exact(ids, labels=ids, use_cache=False).loss.backward()
    for name, x in exact.named_parameters():
        off = (grads[f"grad.{name}"] - x.grad).abs().max() / x.grad.abs().max()
        if off > 5e-6:
            raise ValueError(f"[gradients] {name} is {off:.1e} off float64. Hint: another seed")


def left_padded(model, ids):
    first = torch.tensor([0, 7])
    columns = torch.arange(ids.shape[1])
    real = columns >= first[:, None]  # (B, T)
    ids = torch.where(real, ids, model.config.pad_token_id)
    logits = model(ids, attention_mask=real.long(), use_cache=False).logits
    logits = logits * real[..., None]
    return {"padded.ids": ids, "padded.first": first, "padded.logits": logits}


def greedy(model, ids):
    """(B, NEW) ids; refuses a seed whose choice another machine's rounding could turn."""
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    settings.eos_token_id = None  # random weights: run to the end
    model.generation_config = settings
    new = model.generate(ids, settings)[:, ids.shape[1] :]
    logits = model(torch.cat([ids, new], 1), use_cache=False).logits
    top = logits[:, ids.shape[1] - 1 : -1].topk(2)
    gap = top.values[..., 0] - top.values[..., 1]
    if not torch.equal(top.indices[..., 0], new) or gap.min() < 1e-3:
        raise ValueError("[greedy] a near tie. Hint: another seed")
    return new


def tiny_golden(config, seed):
    model = random_model(config, seed)
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    ids = torch.randint(3, config["vocab_size"], (B, T))
    kept = ("embed", "resid_post", "final_norm", "logits")
    golden = transformers_sites(model, ids, lambda site: site in kept)
    loss, grads = gradients(model, ids)
    with torch.no_grad():
        golden |= left_padded(model, ids) | {"greedy": greedy(model, ids)}
        sites = transformers_sites(model, ids[:1, :10])
        rounded = empty_model(config, torch.bfloat16)
        rounded.load_state_dict(model.state_dict())
        golden["bf16.logits"] = rounded(ids, use_cache=False).logits
    golden |= weights | grads | {"ids": ids, "loss": loss}
    return golden, {"ids": ids[:1, :10]} | sites


def make_tiny(out):
    for name, config, seed in (("grouped", GROUPED, 1), ("scaled", SCALED, 1)):
        golden, sites = tiny_golden(config, seed)
        metadata = provenance(reference="transformers", config=json.dumps(config), seed=seed)
        save_tensors(out / f"tiny_{name}.safetensors", golden, metadata)
    skipped = ("blocks.2.", "blocks.3.")
    sites = {site: x for site, x in sites.items() if not site.startswith(skipped)}
    metadata = provenance(
        reference="transformers", dtype="float32", model="tiny_scaled.safetensors"
    )
    save_tensors(out / "tiny_sites.safetensors", sites, metadata)


SAMPLING_CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 7},
    {"top_k": 1},
    {"top_k": 64, "top_p": 0.95},  # more than there are ids: top_k keeps them all
    {"top_p": 0.5},
    {"top_p": 0.01},  # the best id alone
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_k": 9},  # below 1 it favours what was said
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.8, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
    {"top_k": 5, "ties": True},  # ids tied with the fifth all stay
]


def sampling_case(model, settings, generator):
    """One step of generate() on given logits: the ids left and their probabilities."""
    settings = dict(settings)
    logits = (torch.randn(model.config.vocab_size, generator=generator) * 2.5 * 1000).round() / 1000
    if settings.pop("ties", False):
        logits[[3, 11, 17, 30]] = logits.topk(5).values[4]
    history = torch.randint(model.config.vocab_size, (6,), generator=generator)
    history[4] = history[1]  # a repeated id is penalised once
    options = {"top_k": 0, "top_p": 1.0} | settings
    handle = model.lm_head.register_forward_hook(lambda _m, _x, y: logits.expand_as(y))
    fixed = {"max_new_tokens": 1, "pad_token_id": 0, "do_sample": True}
    report = {"output_scores": True, "return_dict_in_generate": True}
    step = model.generate(history[None], GenerationConfig(**fixed, **report, **options))
    handle.remove()
    probabilities = step.scores[0][0].softmax(-1)
    kept = probabilities.nonzero().flatten().tolist()
    return settings | {
        "history": history.tolist(),
        "logits": [round(x, 3) for x in logits.tolist()],
        "ids": kept,
        "probabilities": [float(f"{probabilities[i]:.8g}") for i in kept],
    }


def make_sampling(out):
    config = GROUPED | {"vocab_size": 40}
    model = random_model(config, seed=3)
    model.generation_config = GenerationConfig()
    generator = torch.Generator().manual_seed(4)
    cases = [sampling_case(model, case, generator) for case in SAMPLING_CASES]
    about = "ids left after transformers' generate() processed the logits, with their probabilities"
    save_json(out / "sampling.json", {"meta": provenance(about=about), "cases": cases})


NOTEBOOK_TINY = {
    "vocab_size": 61,
    "context_length": 32,
    "emb_dim": 16,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 24,
    "head_dim": 8,
    "qk_norm": True,
    "n_kv_groups": 2,
    "rope_local_base": 10_000.0,
    "rope_base": 1_000_000.0,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}


def printed_values(notebook):
    """The numbers (T, 6) that the notebook's quick check cell saved."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "".join(cell["source"]).startswith("model(torch.tensor([1, 2, 3])"):
            text = "".join(cell["outputs"][0]["data"]["text/plain"])
            numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
            return [numbers[i : i + 6] for i in range(0, len(numbers), 6)]
    raise ValueError(f"[notebook] {notebook} has no quick check. Hint: {NOTEBOOK_SOURCE}")


def make_notebook(out, folder):
    plain = notebook_namespace(folder / "standalone-gemma3.ipynb")
    torch.manual_seed(123)
    model = plain["Gemma3Model"](NOTEBOOK_TINY | {"dtype": torch.float32})
    ids = torch.tensor([[1, 2, 3]])
    golden = {"ids": ids, "logits": model(ids)}
    for name, x in model.named_parameters():
        flat = x.detach().flatten()
        golden[name] = torch.cat([flat[:4], flat[-4:]])  # the first four values and the last
    metadata = provenance(reference="notebook", seed=123, config=json.dumps(NOTEBOOK_TINY))
    save_tensors(out / "notebook_init.safetensors", golden, metadata)

    columns = [0, 1, 2, -3, -2, -1]  # those that the notebook prints
    meta = provenance(dtype="bfloat16", seed=123)
    record = {"meta": meta, "ids": ids[0].tolist(), "columns": columns}
    for key in ("standalone-gemma3", "standalone-gemma3-plus-kvcache"):
        notebook = folder / f"{key}.ipynb"
        space = notebook_namespace(notebook)
        torch.manual_seed(123)
        model = space["Gemma3Model"](space["GEMMA3_CONFIG_270M"])
        total = sum(x.numel() for x in model.parameters())
        with torch.no_grad():
            here = model(ids)[0][:, columns].float().tolist()  # (T, 6)
        record[key] = {"here": here, "printed": printed_values(notebook)}
        record["parameters"] = [total, total - model.tok_emb.weight.numel()]
    save_json(out / "notebook_quick_check.json", record)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "golden")
    parser.add_argument("--notebooks", type=pathlib.Path, help="folder of the two .ipynb files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_tiny(args.out)
    make_sampling(args.out)
    if args.notebooks:
        make_notebook(args.out, args.notebooks)


if __name__ == "__main__":
    main()
