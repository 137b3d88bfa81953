#!/usr/bin/env python3
"""Writes what a Python Gemma 3 computes at every probe site, for `gemma parity` to compare with.

    python dump_parity.py --model HF_FOLDER --ids 2,818,5279,529,7001,563 --out dump.safetensors
    python dump_parity.py --model HF_FOLDER --ids ... --out dump.safetensors \\
        --reference notebook --notebook standalone-gemma3.ipynb

Tensors: `ids` int64 (1, T) and each site in the dtype the reference computed it in (a float32 run
gives float32). sites.py says which are caught by hooks and which are formed again. At 1,100 tokens
`scores`, `pattern` and `logits` take most of 2.5 GB: --without leaves sites out.
Versions: requirements.txt.
"""

import argparse
import pathlib
import sys

import torch

from common import notebook_model, notebook_namespace, provenance, save_tensors, transformers_model
from sites import notebook_sites, transformers_sites


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--ids", help="token ids, comma separated; used as given, no BOS added")
    parser.add_argument(
        "--prompt", help="text instead of --ids; the folder's tokenizer.json encodes it"
    )
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--reference", default="transformers", choices=["transformers", "notebook"])
    parser.add_argument("--notebook", help="the user's own copy of a reference notebook (.ipynb)")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="SITE", help="e.g. scores pattern"
    )
    args = parser.parse_args()
    if (args.ids is None) == (args.prompt is None):
        parser.error("give either --ids or --prompt")
    if args.reference == "notebook" and not args.notebook:
        parser.error("--reference notebook needs --notebook FILE.ipynb")
    return args


def prompt_ids(args):
    if args.ids is not None:
        return [int(piece) for piece in args.ids.split(",")]
    from tokenizers import Tokenizer

    return (
        Tokenizer.from_file(str(pathlib.Path(args.model) / "tokenizer.json"))
        .encode(args.prompt)
        .ids
    )


def main():
    args = parse_arguments()
    dtype = getattr(torch, args.dtype)
    ids = torch.tensor([prompt_ids(args)])

    def wanted(site):
        return site not in args.without

    if args.reference == "notebook":
        space = notebook_namespace(args.notebook)
        sites = notebook_sites(notebook_model(space, args.model, dtype), space, ids, wanted)
    else:
        sites = transformers_sites(transformers_model(args.model, dtype), ids, wanted)
    metadata = provenance(reference=args.reference, dtype=args.dtype, model=args.model)
    if args.reference == "notebook":
        metadata["notebook"] = pathlib.Path(args.notebook).name
    save_tensors(args.out, {"ids": ids} | sites, metadata)
    print(f"{args.out}: {len(sites)} sites of {ids.shape[1]} tokens", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"dump_parity.py: error: {error}")
