#!/usr/bin/env python3
"""The README's programs to prototype with, against the gemma program on folders changed by hand.

    python3 tests/test_readme_programs.py GEMMA FOLDER_OF_PROGRAMS TINY_MODEL
"""

import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

TEXT = "the cat and the dog in a house, a tree and the sun. " * 4
LAYER = 1  # of the tiny model, the global one


def run(*words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def gemma(*words):
    return json.loads(run(PROGRAM, *words, "--json"))


def perplexity(model, *text):
    how = ("--engine", "eager", "--dtype", "float32", "-t", "1", "--per-token")
    return gemma("perplexity", "-m", model, *text, "-c", 0, *how)


def copy_without_head(model, folder, layer, head):
    """The model with the columns of o_proj that read one head set to zero."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    tensor = json.loads(data[8 : 8 + length])[f"model.layers.{layer}.self_attn.o_proj.weight"]
    head_dim = json.loads((folder / "config.json").read_text())["head_dim"]
    rows, columns = tensor["shape"]
    assert tensor["dtype"] == "F32"
    for row in range(rows):
        begin = 8 + length + tensor["data_offsets"][0] + 4 * (row * columns + head * head_dim)
        data[begin : begin + 4 * head_dim] = bytes(4 * head_dim)
    path.write_bytes(data)


def copy_with_base(model, folder, base):
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": base}))


class Programs(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.text = self.folder / "text"
        self.text.write_text(TEXT)

    def program(self, name, *words):
        return run(PROGRAMS / f"readme_{name}", MODEL, self.text, *words)

    def test_ablate_head(self):
        lines = self.program("ablate_head", LAYER, 1).splitlines()
        whole, without = (float(line.split()[-1]) for line in lines)
        copy_without_head(MODEL, self.folder / "ablated", LAYER, 1)
        for got, model in ((whole, MODEL), (without, self.folder / "ablated")):
            want = perplexity(model, "-f", self.text)["perplexity"]
            self.assertAlmostEqual(got, want, delta=2e-3)
        self.assertGreater(abs(without - whole), 0.01)

    def test_rope_base(self):
        lines = [line.split() for line in self.program("rope_base", 3).splitlines()]
        copy_with_base(MODEL, self.folder / "other", 3.0)
        for column, model in ((1, MODEL), (2, self.folder / "other")):
            scores = perplexity(model, "-f", self.text)["per_token"]
            step = len(scores) // 12 + 1
            means = []
            for i in range(0, len(scores), step):
                part = scores[i : i + step]
                means.append(2.718281828459045 ** (-sum(x["logprob"] for x in part) / len(part)))
            self.assertEqual(len(lines), len(means))
            for line, mean in zip(lines, means):
                self.assertAlmostEqual(float(line[column]), mean, delta=0.02)
        self.assertNotEqual([line[1] for line in lines], [line[2] for line in lines])
        self.assertEqual([int(line[0]) for line in lines], list(range(1, len(scores) + 1, step)))

    def test_linear_mlp(self):
        self.text.write_text(TEXT * 6)
        ids = gemma("tokenize", "-m", MODEL, "-f", self.text)["ids"]
        held_out = perplexity(MODEL, "--ids", ",".join(map(str, ids[-257:])))["nll"]
        losses = []
        for steps in (0, 25):
            words = self.program("linear_mlp", LAYER, steps).split()
            self.assertAlmostEqual(float(words[2]), held_out, delta=2e-3)
            losses.append(float(words[6]))
        self.assertLess(losses[1], losses[0])


if __name__ == "__main__":
    PROGRAM, PROGRAMS, MODEL = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    unittest.main(argv=sys.argv[:1] + sys.argv[4:])
