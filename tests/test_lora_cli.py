#!/usr/bin/env python3
"""gemma --lora from outside: an adapter's files against the weights that they stand for.

    python3 tests/test_lora_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import pathlib
import random
import shutil
import struct
import tempfile
import unittest

import test_cli as cli
from test_cli import PROMPT_IDS, error, gemma, one_object
from test_patch_cli import tensor_file

WIDTH, HIDDEN, LAYERS, RANK, ALPHA = 16, 32, 2, 2, 3
DOWN = "model.layers.{}.mlp.down_proj"


def read_tensors(path):
    """name -> (shape, numbers) of a safetensors file of float32 tensors."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])
            found[name] = (entry["shape"], values)
    return found


def bfloat16(x):
    """x cut to what bfloat16 holds."""
    return struct.unpack("<f", b"\0\0" + struct.pack("<f", x)[2:])[0]


class Lora(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        weights = read_tensors(cli.MODELS / "ids" / "model.safetensors")
        self.weights = {k: (s, [bfloat16(x) for x in v]) for k, (s, v) in weights.items()}
        self.base = self.model("base", self.weights)
        self.matrices = {}

    def model(self, name, weights):
        (self.folder / name).mkdir()
        shutil.copy(cli.MODELS / "ids" / "config.json", self.folder / name)
        tensor_file(self.folder / name / "model.safetensors", **weights)
        return self.folder / name

    def adapter(self, name, seed=1):
        """A folder as PEFT writes it; its numbers are such that float32 adds them exactly."""
        draw = random.Random(seed)
        shapes = {"lora_A": [RANK, HIDDEN], "lora_B": [WIDTH, RANK]}
        self.matrices[name] = {
            f"base_model.model.{DOWN.format(layer)}.{matrix}.weight": (
                shape,
                [draw.randint(-31, 31) / 64 for _ in range(shape[0] * shape[1])],
            )
            for layer in range(LAYERS)
            for matrix, shape in shapes.items()
        }
        path = self.folder / name
        path.mkdir()
        tensor_file(path / "adapter_model.safetensors", **self.matrices[name])
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        text = json.dumps({**config, "target_modules": ["down_proj"]})
        (path / "adapter_config.json").write_text(text, encoding="utf-8")
        return path

    def by_hand(self, **scales):
        """A model whose weights have the adapters added: W + scale * alpha / r * B A."""
        weights = dict(self.weights)
        for name, scale in scales.items():
            for layer in range(LAYERS):
                stem = f"base_model.model.{DOWN.format(layer)}"
                A = self.matrices[name][stem + ".lora_A.weight"][1]
                B = self.matrices[name][stem + ".lora_B.weight"][1]
                shape, values = weights[DOWN.format(layer) + ".weight"]
                added = []
                for row in range(WIDTH):
                    for column in range(HIDDEN):
                        x = sum(B[row * RANK + k] * A[k * HIDDEN + column] for k in range(RANK))
                        added.append(values[len(added)] + scale * ALPHA / RANK * x)
                weights[DOWN.format(layer) + ".weight"] = (shape, added)
        return self.model("by_hand", weights)

    def run_of(self, folder, *lora, more=()):
        flags = [word for one in lora for word in ("--lora", one)]
        return ("logits", "-m", folder, "--ids", PROMPT_IDS, "--top", 300, *flags, *more)

    def logits(self, *run, more=()):
        rows = one_object(*self.run_of(*run, more=more))["top"]
        return [row["logit"] for row in sorted(rows, key=lambda row: row["id"])]

    def close(self, ours, want, plain):
        self.assertLess(max(abs(a - b) for a, b in zip(ours, want)), 1e-4)
        self.assertGreater(max(abs(a - b) for a, b in zip(want, plain)), 0.1)

    def test_an_adapter_is_its_weights(self):
        one = self.adapter("one")
        want, plain = self.logits(self.by_hand(one=1)), self.logits(self.base)
        for engine in ("auto", "eager"):
            self.close(self.logits(self.base, one, more=("--engine", engine)), want, plain)

    def test_scales_and_adapters_on_each_other(self):
        one, two = self.adapter("one"), self.adapter("two", seed=2)
        want = self.logits(self.by_hand(one=0.5, two=-2))
        plain = self.logits(self.base, one, two)
        self.close(self.logits(self.base, f"{one}=0.5", f"{two}=-2"), want, plain)

    def test_eager_adds_beside_the_weights_and_others_round_the_sum(self):
        one = self.adapter("one")
        rounded = self.by_hand(one=1)
        for engine, said in (("auto", "merged into weights of bf"), ("eager", "attached to the")):
            more = ("--dtype", "bfloat16", "--engine", engine)
            same = self.logits(self.base, one, more=more) == self.logits(rounded, more=more)
            self.assertEqual(same, engine == "auto")
            self.assertIn(f"{one}: {said}", gemma(*self.run_of(self.base, one, more=more)).stderr)

    def test_names_with_equals_signs(self):
        name = self.adapter("a=1")
        self.matrices["one"] = self.matrices["a=1"]
        want, plain = self.logits(self.by_hand(one=1)), self.logits(self.base)
        self.close(self.logits(self.base, name), want, plain)
        self.close(self.logits(self.base, f"{name}=1.0"), want, plain)

    def test_refusals(self):
        one = self.adapter("one")
        for scale in ("", "x", "2x", "inf", "nan", "1e999"):
            wrong = error(*self.run_of(self.base, f"{one}={scale}"))
            self.assertIn(f"expected DIR or DIR=SCALE, got {scale} for the scale", wrong)
        self.assertIn("/nowhere/adapter_config.json", error(*self.run_of(self.base, "/nowhere")))
        self.assertIn("--lora", error(*self.run_of(self.base), "--lora", code=2))


if __name__ == "__main__":
    cli.main()
