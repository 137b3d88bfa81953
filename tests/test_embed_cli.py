#!/usr/bin/env python3
"""gemma embed from outside: its files, its numbers, its page, its errors.

    python3 tests/test_embed_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import ast
import json
import math
import pathlib
import struct
import tempfile
import unittest
import xml.etree.ElementTree

import test_cli as cli
from test_cli import error, gemma, model, one_object

E = 16
TEXTS = [[2, 30, 40, 50], [2, 30], [2, 269, 270, 271, 272, 10, 11], [2, 40, 41]]


def read_npy(path):
    data = path.read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00"
    (length,) = struct.unpack("<H", data[8:10])
    header = ast.literal_eval(data[10 : 10 + length].decode())
    assert header["descr"] == "<f4" and not header["fortran_order"]
    rows, columns = header["shape"]
    flat = struct.unpack(f"<{rows * columns}f", data[10 + length :])
    return [list(flat[row * columns : (row + 1) * columns]) for row in range(rows)]


def read_vectors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    rows, columns = header["vectors"]["shape"]
    flat = struct.unpack(f"<{rows * columns}f", data[8 + length :])
    return header["__metadata__"], [
        list(flat[row * columns : (row + 1) * columns]) for row in range(rows)
    ]


def length(vector):
    return math.sqrt(sum(x * x for x in vector))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / length(a) / length(b)


class Embed(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.texts = self.folder / "texts.jsonl"
        self.texts.write_text("".join(json.dumps(ids) + "\n" for ids in TEXTS))

    def embed(self, *more, name="ids"):
        return one_object("embed", *model(name), "--prompts-jsonl", self.texts, *more)

    def close(self, a, b, delta=1e-5):
        self.assertEqual(len(a), len(b))
        for x, y in zip(a, b):
            self.assertAlmostEqual(x, y, delta=delta)

    def test_json(self):
        value = self.embed()
        self.fields(value, "vectors similarity nearest what normalized labels")
        self.assertEqual([len(row) for row in value["vectors"]], [E] * 4)
        self.assertEqual((value["what"], value["normalized"]), ("mean of final_norm", True))
        self.assertIsNone(value["similarity"])
        self.assertIsNone(value["nearest"])
        self.assertEqual(value["labels"][1], "2,30")
        for row in value["vectors"]:
            self.assertAlmostEqual(length(row), 1, places=5)
        alone = one_object("embed", *model("ids"), "--ids", "2,30")["vectors"]
        self.close(alone[0], value["vectors"][1])

    def test_poolings_agree_with_captured_values(self):
        out = self.folder / "x.safetensors"
        gemma("capture", *model("ids"), "--sites", "blocks.*.resid_post,final_norm",
              "--ids", "2,30,40,50", "-o", out)  # fmt: skip
        data = out.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])

        def site(name):
            begin, end = header[name]["data_offsets"]
            flat = struct.unpack(f"<{4 * E}f", data[8 + size + begin : 8 + size + end])
            return [flat[row * E : (row + 1) * E] for row in range(4)]

        def pooled(rows, weights):
            return [
                sum(w * x for w, x in zip(weights, column)) / sum(weights) for column in zip(*rows)
            ]

        def first(*more):
            return self.embed("--raw", *more)["vectors"][0]

        last = site("final_norm")
        self.close(first(), pooled(last, [1, 1, 1, 1]))
        self.close(first("--pooling", "last"), last[3])
        self.close(first("--pooling", "weighted"), pooled(last, [1, 2, 3, 4]))
        self.close(first("--skip-bos"), pooled(last, [0, 1, 1, 1]))
        self.close(first("--layers", 1), pooled(site("blocks.1.resid_post"), [1, 1, 1, 1]))
        both = [
            (a + b) / 2
            for a, b in zip(
                pooled(site("blocks.0.resid_post"), [1, 1, 1, 1]),
                pooled(site("blocks.1.resid_post"), [1, 1, 1, 1]),
            )
        ]
        self.close(first("--layers", "0,1"), both)

    def test_files(self):
        want = self.embed()["vectors"]
        out = self.folder / "out"
        self.embed("-o", out)
        metadata, rows = read_vectors(out)
        self.assertEqual(metadata["what"], "mean of final_norm")
        for row, each in zip(rows, want, strict=True):
            self.close(row, each, 1e-6)
        self.embed("-o", out, "--format", "npy")
        for row, each in zip(read_npy(out), want, strict=True):
            self.close(row, each, 1e-6)
        self.embed("-o", out, "--format", "json")
        for row, each in zip(json.loads(out.read_text()), want, strict=True):
            self.close(row, each, 1e-6)

    def test_similarity(self):
        value = self.embed("--similarity", "--batch", 1)
        for i, row in enumerate(value["similarity"]):
            for j, x in enumerate(row):
                self.assertAlmostEqual(x, cosine(value["vectors"][i], value["vectors"][j]), places=5)
        shown = gemma(
            "embed", *model("ids"), "--prompts-jsonl", self.texts, "--similarity"
        ).stdout.splitlines()
        self.assertEqual(len(shown), 5)
        self.assertEqual(float(shown[0].split()[1]), round(value["similarity"][0][1], 3))
        self.assertEqual(shown[-1], "4 vectors of 16, mean of final_norm")

    def test_nearest(self):
        value = one_object(
            "embed", *model("ids"), "--token-ids", "30,40", "--nearest", 300, "--raw"
        )
        self.assertEqual(value["what"], "rows of the embedding table")
        for id, vector, found in zip((30, 40), value["vectors"], value["nearest"], strict=True):
            self.assertEqual(found[0]["id"], id)
            self.assertAlmostEqual(found[0]["similarity"], 1, places=5)
            self.assertEqual(sorted(each["id"] for each in found), [*range(300)])
            order = [each["similarity"] for each in found]
            self.assertEqual(order, sorted(order, reverse=True))
        cross = next(each for each in value["nearest"][0] if each["id"] == 40)
        self.assertAlmostEqual(cross["similarity"], cosine(*value["vectors"]), places=5)
        self.assertEqual(len(self.embed("--nearest", 3)["nearest"][2]), 3)
        shown = gemma("embed", *model("text"), "--tokens", "ab", "--nearest", 2).stdout
        self.assertRegex(shown, r"(?m)^  1\.0000 +\d+  ab$")

    def test_page(self):
        path = self.folder / "page.html"
        self.embed("--html", path, "--nearest", 2)
        page = path.read_text(encoding="utf-8")
        for word in ("Cosine similarity", "Principal axes", "Nearest rows", "of the variance"):
            self.assertIn(word, page)
        self.assertEqual(page.count("<circle"), len(TEXTS))
        for word in ("<script", "http:", "https:", " src="):
            self.assertNotIn(word, page)
        for part in page.split("<svg")[1:]:
            xml.etree.ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
        gemma("embed", *model("ids"), "--ids", "2,30", "--html", path)
        self.assertNotIn("<svg", path.read_text())  # one vector: nothing to compare

    def test_errors_leave_no_file(self):
        before = sorted(self.folder.iterdir())
        out = self.folder / "out"
        run = ("embed", *model("ids"), "--prompts-jsonl", self.texts, "-o", out, "--html", out)
        self.assertIn("expected mean, last or weighted", error(*run, "--pooling", "max"))
        self.assertIn("expected json, npy or safetensors", error(*run, "--format", "csv"))
        self.assertIn("layers: expected 0 to 1, got 2", error(*run, "--layers", 2))
        self.assertIn("--nearest: expected at most 300", error(*run, "--nearest", 301))
        self.assertIn("[embed] --engine", error(*run, "--engine", "fused"))
        self.assertIn("expected 0 to 299, got 300", error(*run, "--token-ids", "300"))
        self.texts.write_text("[2]\n[]\n")
        self.assertIn("text 1: expected at least 1 token", error(*run))
        self.assertEqual(sorted(self.folder.iterdir()), before)


if __name__ == "__main__":
    cli.main()
