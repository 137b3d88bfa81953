#!/usr/bin/env python3
"""Fails on an #include that goes against the arrows between the rooms.

    python3 tests/check_includes.py ROOT         checks gemma_torch/, apps/, notebooks_equiv/ of a checkout
    python3 tests/check_includes.py --self-test  checks that violations are found
"""
import pathlib
import re
import sys
import tempfile

# Room -> the rooms whose headers it may include, beside its own.
BELOW_IO = {"base", "kernels", "model", "quant"}
BELOW_PRETRAINED = BELOW_IO | {"io", "text"}
BELOW_APPS = BELOW_PRETRAINED | {"engine", "generate", "adapt", "inspect", "pretrained"}
ROOMS = {
    "base": set(),
    "kernels": set(),
    "model": {"base", "kernels"},
    "quant": {"base", "kernels", "model"},
    "io": BELOW_IO,
    "text": {"base"},
    "engine": BELOW_IO,
    "generate": {"base", "engine"},
    "adapt": BELOW_PRETRAINED | {"engine", "generate"},  # text: what is learnt from is encoded
    "inspect": BELOW_IO | {"io", "engine", "generate"},
    "pretrained": BELOW_PRETRAINED | {"engine"},  # Sampling, whose defaults a model folder holds
    "apps": BELOW_APPS,
    "notebooks_equiv": BELOW_APPS,
}

# Start of a third party's header -> files that may include it. The first match counts.
THIRD_PARTIES = [
    ("nlohmann/", r"gemma_torch/(model/config|pretrained|io/|text/|adapt/|inspect/)|apps/"),
    ("sentencepiece", r"gemma_torch/text/"),
    ("google/protobuf", r"gemma_torch/text/"),
    ("CLI/", r"apps/"),
    ("mpi.h", r"gemma_torch/adapt/ranks_mpi"),
    ("catch2/", r"(?!)"),
    ("torch/csrc/jit", r"gemma_torch/engine/traced"),
    ("torch/script.h", r"gemma_torch/engine/traced"),
    ("ATen/cuda", r"gemma_torch/engine/graph"),
    ("c10/cuda", r"gemma_torch/engine/graph"),
    ("torch/", r"(?!gemma_torch/kernels/)"),
    ("ATen/", r"(?!gemma_torch/kernels/)"),
    ("c10/", r"(?!gemma_torch/kernels/)"),
    ("caffe2/", r"(?!gemma_torch/kernels/)"),
    ("fmt/", r"(?!gemma_torch/kernels/)"),
]
INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.MULTILINE)
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


def room_of(path):
    """gemma_torch/io/gguf.h -> io; gemma_torch/pretrained.h -> pretrained; apps/main.cpp -> apps."""
    parts = pathlib.PurePosixPath(path).parts
    if parts[0] != "gemma_torch":
        return parts[0]
    return parts[1] if len(parts) > 2 else parts[1].split(".")[0]


def objection(file, header):
    """Why `file` may not include `header`, or None. Both are relative to the root."""
    for prefix, allowed in THIRD_PARTIES:
        if header.startswith(prefix):
            return None if re.match(allowed, file) else f"{header} is not for this file"
    if not header.startswith("gemma_torch/"):
        return None
    source, target = room_of(file), room_of(header)
    if source not in ROOMS:
        return f"room {source} has no row in check_includes.py"
    if target == source or target in ROOMS[source]:
        return None
    return f"{header}: {source} may include {', '.join(sorted(ROOMS[source])) or 'no other room'}"


def violations(root):
    found = []
    for top in ("gemma_torch", "apps", "notebooks_equiv"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in SOURCES:
                continue
            file = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            for match in INCLUDE.finditer(text):
                why = objection(file, match.group(1))
                if why:
                    line = text.count("\n", 0, match.start(1)) + 1
                    found.append(f"{file}:{line}: {why}")
    return found


BAD = [
    ("gemma_torch/base/error.h", '"gemma_torch/model/config.h"'),
    ("gemma_torch/kernels/cpu/gemv.cpp", '"gemma_torch/base/error.h"'),
    ("gemma_torch/kernels/cpu/gemv.h", "<ATen/core/Tensor.h>"),
    ("gemma_torch/model/gemma3.cpp", '"gemma_torch/io/safetensors.h"'),
    ("gemma_torch/model/gemma3.h", "<nlohmann/json.hpp>"),
    ("gemma_torch/text/tokenizer.cpp", '"gemma_torch/io/gguf.h"'),
    ("gemma_torch/io/gguf.cpp", '"gemma_torch/text/tokenizer.h"'),
    ("gemma_torch/io/gguf.h", "<sentencepiece_processor.h>"),
    ("gemma_torch/engine/engine.h", '"gemma_torch/io/safetensors.h"'),
    ("gemma_torch/engine/eager.cpp", "<torch/csrc/jit/frontend/tracer.h>"),
    ("gemma_torch/generate/generate.cpp", '"gemma_torch/pretrained.h"'),
    ("gemma_torch/adapt/lora.cpp", '"gemma_torch/inspect/capture.h"'),
    ("gemma_torch/inspect/score.cpp", '"gemma_torch/text/tokenizer.h"'),
    ("gemma_torch/pretrained.cpp", '"gemma_torch/generate/generate.h"'),
    ("gemma_torch/attic/old.h", '"gemma_torch/base/error.h"'),
    ("apps/main.cpp", "<ATen/cuda/CUDAGraph.h>"),
]
GOOD = [
    ("gemma_torch/model/config.cpp", "<nlohmann/json.hpp>"),
    ("gemma_torch/model/gemma3.h", '"gemma_torch/model/config.h"'),
    ("gemma_torch/kernels/cpu/gemv.cpp", "<immintrin.h>"),
    ("gemma_torch/engine/traced.cpp", "<torch/csrc/jit/frontend/tracer.h>"),
    ("gemma_torch/pretrained.h", '"gemma_torch/text/tokenizer.h"'),
    ("gemma_torch/adapt/training_data.cpp", '"gemma_torch/text/tokenizer.h"'),
    ("apps/convert.cpp", '"gemma_torch/pretrained.h"'),
]


def self_test():
    for cases, expected in ((BAD, 1), (GOOD, 0)):
        for file, header in cases:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / file
                path.parent.mkdir(parents=True)
                path.write_text(f"#pragma once\n#  include {header}\n", encoding="utf-8")
                found = violations(pathlib.Path(folder))
                if len(found) != expected:
                    sys.exit(f"{file} including {header}: expected {expected}, got {found}")
                if found and not found[0].startswith(f"{file}:2:"):
                    sys.exit(f"the message does not name the line: {found[0]}")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--self-test":
        return self_test()
    found = violations(pathlib.Path(sys.argv[1]))
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
