#!/usr/bin/env python3
"""LoRA adapters that PEFT made in `gemma`: logits of both on the same weights, in float32.

    python tests/reference/check_lora.py --gemma build/release/gemma --model FOLDER

Needs torch, transformers, peft and safetensors. Matrices are random, large enough to move logits far.
"""
import argparse
import pathlib
import subprocess
import tempfile

import peft
import torch
import transformers
from safetensors.torch import load_file

IDS = [2, 818, 5279, 529, 7001, 563, 506, 2150, 699, 236761, 1437, 563, 496]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all seven, r 16": dict(r=16, lora_alpha=32, target_modules=ALL),
    "rsLoRA, r 8": dict(r=8, lora_alpha=8, use_rslora=True, target_modules=ALL),
    "q and v, r 4": dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
}


def ours(args, folder, adapters):
    out = pathlib.Path(folder) / "logits.safetensors"
    words = [args.gemma, "capture", "-m", args.model, "--dtype", "float32", "--sites", "logits"]
    for adapter in adapters:
        words += ["--lora", str(adapter)]
    words += ["--ids", ",".join(map(str, IDS)), "-t", str(args.threads), "-o", str(out)]
    subprocess.run(words, check=True, capture_output=True)
    return load_file(out)["logits"][0]


def base_of(args):
    return transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    )


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gemma", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    plain = logits_of(base_of(args))
    for name, settings in CASES.items():
        torch.manual_seed(3)
        model = peft.get_peft_model(base_of(args), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.02)
        model.eval()
        with tempfile.TemporaryDirectory() as folder:
            adapter = pathlib.Path(folder) / "adapter"
            model.save_pretrained(adapter)
            want = logits_of(model)
            found = ours(args, folder, [adapter])
            want_half = logits_of(scaled(model, 0.5))
            found_half = ours(args, folder, [f"{adapter}=0.5"])
        moved = (want - plain).abs().max().item()
        print(
            f"{name}: logits move by up to {moved:.2f}; "
            f"largest difference {(found - want).abs().max().item():.1e}, "
            f"at half scale {(found_half - want_half).abs().max().item():.1e}",
            flush=True,
        )


def scaled(model, by):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(by)
    return model


if __name__ == "__main__":
    main()
