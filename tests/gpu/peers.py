#!/usr/bin/env python3
"""What run_all.sh needs of Python: a model, transformers' speed beside ours, the tables.

    peers.py model FOLDER                  a random Gemma 3 of the 270M shape, bfloat16, written by transformers
    peers.py speed FOLDER --device cuda    tok/s of transformers, as it is and with a static cache, compiled
    peers.py summary OUT                   the tables of a run, as Markdown
"""

import argparse
import json
import pathlib
import statistics
import time

PROMPT = [2, 818, 5279, 529, 7001, 563]
NEW_TOKENS, LONG = 128, 512


def make_model(args):
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(18)]
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
        layer_types=layers, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
        max_position_embeddings=32768, tie_word_embeddings=True, torch_dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(123)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0, 0.2)  # zero at first, which would hide a norm that is left out
    model.to(torch.bfloat16).save_pretrained(args.folder)


def rates(device, work, count, times=5):
    import torch

    seconds = []
    for i in range(times + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - start] if i >= 2 else []
    return [count / s for s in seconds]


def bandwidth(device):
    """GB/s that a sum over 4 GiB reads."""
    import torch

    words = torch.ones(1 << (30 if device == "cuda" else 26), device=device)
    return statistics.median(rates(device, words.sum, words.nbytes / 1e9))


def speed(args):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    new = NEW_TOKENS if args.device == "cuda" else 8
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    ids = torch.tensor([PROMPT], device=args.device)
    long = torch.randint(5, 200_000, (1, LONG), device=args.device)
    result = {"versions": f"torch {torch.__version__}", "bandwidth_gb_s": bandwidth(args.device)}

    def save():
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")

    with torch.inference_mode():
        result["decode"] = rates(args.device, lambda: model.generate(ids, **options), new, 3)
        result["prefill"] = rates(args.device, lambda: model(long, logits_to_keep=1), LONG)
        save()
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        options["cache_implementation"] = "static"
        result["decode_static_compiled"] = rates(
            args.device, lambda: model.generate(ids, **options), new, 3
        )
        save()


def read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def summary(args):
    out = pathlib.Path(args.folder)
    print(f"{(out / 'device.txt').read_text().strip()}\n")
    print("| parity with CPU float32 eager | sites in tolerance | logits, max | decode, max |")
    print("|---|---|---|---|")
    for path in sorted(out.glob("parity-*.json")):
        report = read(path)
        if report:
            sites = {site["site"]: site for site in report["sites"]}
            good = sum(site["ok"] for site in sites.values())
            print(
                f"| {report['engine']}, {report['dtype']} | {good} of {len(sites)} "
                f"| {sites['logits']['max_abs']:.2g} | {sites['decode']['max_abs']:.2g} |"
            )
    peer = read(out / "transformers.json") or {}
    limit = peer.get("bandwidth_gb_s")
    print("\n| bfloat16 | test | tok/s | range | of the bandwidth | device memory |")
    print("|---|---|---|---|---|---|")
    for path in sorted(out.glob("bench-*.json")):
        for record in read(path) or []:
            test = (
                f"p{record['n_prompt']} n{record['n_gen']} d{record['n_depth']} "
                f"k{record['top_k']}"
            )
            used = record["achieved_gb_s"]
            share = f"{100 * used / limit:.0f} %" if used and limit else ""
            memory = record["peak_device_memory_bytes"]
            print(
                f"| {path.stem[6:]} | {test} | {record['median_ts']:.0f} "
                f"| {record['min_ts']:.0f}-{record['max_ts']:.0f} | {share} "
                f"| {f'{memory / 1e6:.0f} MB' if memory else ''} |"
            )
    for name in ("decode", "decode_static_compiled", "prefill"):
        if name in peer:
            low, high = min(peer[name]), max(peer[name])
            middle = statistics.median(peer[name])
            print(f"| transformers | {name} | {middle:.0f} | {low:.0f}-{high:.0f} | | |")
    if limit:
        print(f"\n{limit:.0f} GB/s read by a sum over a large tensor; {peer['versions']}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("model", make_model), ("speed", speed), ("summary", summary)):
        command = commands.add_parser(name)
        command.add_argument("folder")
        command.set_defaults(work=work)
        if name == "speed":
            command.add_argument("--device", default="cuda")
            command.add_argument("--out", required=True)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
