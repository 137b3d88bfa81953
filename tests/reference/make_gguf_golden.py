"""Makes tests/golden/gguf_blocks.safetensors: random blocks of every quantised GGUF type that gemma_torch reads, as
bytes (TYPE.bytes, blocks x bytes per block) and as the gguf Python package dequantises them (TYPE.values, float32).

    pip install gguf==0.19.0 safetensors numpy
    python tests/reference/make_gguf_golden.py tests/golden/gguf_blocks.safetensors
"""

import sys
from importlib.metadata import version

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

BLOCKS = {
    "F16": 64,
    "BF16": 64,
    "Q4_0": 24,
    "Q4_1": 24,
    "Q5_0": 24,
    "Q5_1": 24,
    "Q8_0": 24,
    "Q4_K": 6,
    "Q5_K": 6,
    "Q6_K": 6,
}
# Byte offsets of the float16 scales of a block. Random bits there would give infinities and NaN.
HALVES = {
    "F16": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def main(path):
    rng = np.random.default_rng(270)
    tensors = {}
    for name, count in BLOCKS.items():
        qtype = GGMLQuantizationType[name]
        blocks = rng.integers(0, 256, (count, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8)
        for at in HALVES.get(name, []):
            scale = rng.standard_normal(count) * 10.0 ** rng.integers(
                -8, 3, count
            )  # subnormals among them
            blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(count, 2)
        if name == "BF16":
            blocks[:, 1] &= 0xBF  # exponents below 128: no infinity
        tensors[f"{name}.bytes"] = blocks
        tensors[f"{name}.values"] = np.ascontiguousarray(
            dequantize(blocks, qtype).astype(np.float32)
        )
    versions = {package: version(package) for package in ("gguf", "numpy", "safetensors")}
    save_file(tensors, path, metadata={"script": "tests/reference/make_gguf_golden.py", **versions})


if __name__ == "__main__":
    main(*sys.argv[1:])
