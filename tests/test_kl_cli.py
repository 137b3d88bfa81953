#!/usr/bin/env python3
"""gemma kl and gemma surprisal from outside: files that Python reads, numbers that agree, errors.

    python3 tests/test_kl_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import csv
import io
import json
import math
import pathlib
import struct
import tempfile
import unittest

import test_cli as cli
from test_cli import error, gemma, model, one_object

IDS = ",".join(str(2 + i * 7 % 290) for i in range(37))
TEXT = 'abc ab  "c, d"\nabcd ab\n'


def codes(path):
    """(metadata, rows of ln p) of a file of gemma kl save."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begin, end = header["codes"]["data_offsets"]
    rows, columns = header["codes"]["shape"]
    flat = struct.unpack(f"<{rows * columns}H", data[8 + length + begin : 8 + length + end])
    log_p = [
        [-((code / 8192) ** 2) for code in flat[row * columns : (row + 1) * columns]]
        for row in range(rows)
    ]
    return header["__metadata__"], log_p


class Kl(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.out = self.folder / "out.safetensors"

    def save(self, *more, name="ids", source=("--ids", IDS)):
        return one_object("kl", "save", *model(name), *source, "-o", self.out, *more)

    def compare(self, *more, name="ids"):
        return one_object("kl", "compare", self.out, *model(name), *more)

    def test_save(self):
        value = self.save("-c", 16)
        self.fields(value, "out tokens positions bytes nll perplexity")
        self.assertEqual((value["tokens"], value["positions"]), (37, 14))
        self.assertEqual(value["bytes"], self.out.stat().st_size)
        scores = one_object(
            "perplexity", *model("ids"), "--ids", IDS, "-c", 16, "--per-token"
        )
        self.assertAlmostEqual(value["nll"], scores["nll"], places=5)
        metadata, log_p = codes(self.out)
        self.assertEqual(metadata["chunk"], "16")
        self.assertEqual((metadata["engine"], metadata["dtype"]), ("eager", "float32"))
        self.assertNotIn("vocabulary", metadata)
        for row, score in zip(log_p, scores["per_token"], strict=True):
            self.assertAlmostEqual(sum(map(math.exp, row)), 1, delta=1e-3)
            self.assertAlmostEqual(row[score["id"]], score["logprob"], delta=5e-4)

    def test_compare(self):
        self.save("-c", 0)
        value = self.compare()
        self.fields(
            value,
            """positions kl same_top delta_p rms_delta_p reference_perplexity perplexity
            nll_difference reference other""",
        )
        self.fields(value["kl"], "mean error median p90 p95 p99 max")
        self.assertEqual(value["positions"], 36)
        self.assertLess(abs(value["kl"]["mean"]), 1e-7)
        self.assertGreater(value["same_top"]["value"], 0.9)
        other = self.compare("--dtype", "bfloat16")
        self.assertEqual(other["other"]["dtype"], "bfloat16")
        self.assertEqual(other["reference"]["dtype"], "float32")
        kl = other["kl"]
        self.assertGreater(kl["mean"], 1e-7)
        self.assertLessEqual(kl["median"], kl["p90"])
        self.assertLessEqual(kl["p99"], kl["max"])
        self.assertGreater(other["rms_delta_p"]["value"], value["rms_delta_p"]["value"])
        whole = one_object("perplexity", *model("ids"), "--ids", IDS, "-c", 0, "--dtype", "bfloat16")
        self.assertAlmostEqual(math.log(other["perplexity"]["value"]), whole["nll"], places=5)

    def test_compare_as_text(self):
        self.save("-c", 0)
        shown = gemma("kl", "compare", self.out, *model("ids")).stdout
        for word in ("mean KL", "same top token", "RMS Δp", "reference perplexity", "+-"):
            self.assertIn(word, shown)

    def test_another_vocabulary(self):
        self.save("-c", 0, name="text", source=("-p", TEXT))
        self.assertEqual(len(codes(self.out)[0]["vocabulary"]), 16)
        self.compare(name="text")
        run = ("kl", "compare", self.out)
        self.assertIn("[kl] vocabulary: expected 300 tokens", error(*run, *model("golden")))
        data = self.out.read_bytes()
        at = data.index(b'"vocabulary":"') + len(b'"vocabulary":"')
        self.out.write_bytes(data[:at] + b"0123456789abcdef" + data[at + 16 :])
        self.assertIn("another one of as many tokens", error(*run, *model("text")))
        self.compare(name="ids")  # has no tokenizer to tell

    def test_errors_leave_no_file(self):
        run = ("kl", "save", *model("ids"), "-o", self.out)
        self.assertIn("one chunk of 512 tokens, got 37", error(*run, "--ids", IDS))
        self.assertIn("got 300", error(*run, "-c", 0, "--ids", "2,300"))
        self.assertEqual(list(self.folder.iterdir()), [])
        self.assertIn("[usage]", error("kl", code=2))
        self.assertIn("[usage]", error("kl", "save", "--nonsense", code=2))
        self.assertIn("--out", error("kl", "save", "--ids", IDS, code=2))
        self.assertIn("/nowhere", error("kl", "compare", "/nowhere", *model("ids")))
        weights = cli.MODELS / "ids" / "model.safetensors"
        self.assertIn(
            "expected a file of `gemma kl save`", error("kl", "compare", weights, *model("ids"))
        )


class Surprisal(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def surprisal(self, *more, name="ids", source=("--ids", IDS)):
        return one_object("surprisal", *model(name), *source, *more)

    def test_json(self):
        value = self.surprisal()
        self.fields(value, "tokens mean_bits mean_entropy_bits per_token words")
        self.assertIsNone(value["words"])
        rows = value["per_token"]
        self.fields(rows[0], "index id piece logprob surprisal_bits entropy_bits rank")
        self.assertEqual([row["index"] for row in rows], [*range(1, 37)])
        self.assertEqual(value["tokens"], 36)
        scores = one_object("perplexity", *model("ids"), "--ids", IDS, "-c", 0, "--per-token")
        for row, score in zip(rows, scores["per_token"], strict=True):
            self.assertEqual(row["id"], score["id"])
            self.assertAlmostEqual(row["logprob"], score["logprob"], places=5)
            self.assertAlmostEqual(row["surprisal_bits"], -row["logprob"] / math.log(2), places=6)
        self.assertAlmostEqual(
            value["mean_bits"], sum(row["surprisal_bits"] for row in rows) / 36, places=9
        )
        self.assertAlmostEqual(
            value["mean_entropy_bits"], sum(row["entropy_bits"] for row in rows) / 36, places=9
        )

    def test_rank_and_entropy_agree_with_logits(self):
        row = self.surprisal(source=("--ids", "2,30,40"))["per_token"][1]
        top = one_object("logits", *model("ids"), "--ids", "2,30", "--top", 300)["top"]
        place = next(i for i, each in enumerate(top) if each["id"] == 40)
        self.assertEqual(row["rank"], place + 1)
        entropy = -sum(math.exp(each["logprob"]) * each["logprob"] for each in top) / math.log(2)
        self.assertAlmostEqual(row["entropy_bits"], entropy, places=4)

    def test_sliding_windows(self):
        value = self.surprisal("-c", 8)
        self.assertEqual([row["index"] for row in value["per_token"]], [*range(1, 37)])
        whole = self.surprisal()["per_token"]
        same = [abs(a["logprob"] - b["logprob"]) < 1e-5 for a, b in zip(value["per_token"], whole)]
        self.assertTrue(all(same[:7]))
        self.assertFalse(all(same))

    def test_csv(self):
        path = self.folder / "out.csv"
        shown = gemma("surprisal", *model("text"), "-p", TEXT, "--csv", path).stdout
        self.assertRegex(shown, r"^\d+\.\d{4} bits a token, \d+\.\d{4} expected, over \d+ tokens\n$")
        value = self.surprisal(name="text", source=("-p", TEXT))
        data = path.read_bytes().decode()
        rows = list(csv.DictReader(io.StringIO(data, newline="")))
        self.assertEqual(len(rows), value["tokens"])
        self.assertEqual(
            list(rows[0]), "index id piece logprob surprisal_bits entropy_bits rank".split()
        )
        for row, want in zip(rows, value["per_token"], strict=True):
            self.assertEqual(row["piece"], want["piece"])
            self.assertEqual(int(row["rank"]), want["rank"])
            self.assertAlmostEqual(float(row["surprisal_bits"]), want["surprisal_bits"])
        self.assertTrue(any(c in row["piece"] for row in rows for c in '",\n'))
        self.assertEqual(data.count("\r\n"), len(rows) + 1)

    def test_words(self):
        value = self.surprisal("--words", name="text", source=("-p", TEXT))
        words = value["words"]
        self.assertEqual([word["word"] for word in words], TEXT.split())
        total = sum(word["surprisal_bits"] for word in words)
        self.assertAlmostEqual(total, value["mean_bits"] * value["tokens"], places=6)
        self.assertEqual(sum(word["tokens"] for word in words), value["tokens"])
        self.assertEqual(words[0]["first"], 1)
        for word, following in zip(words, words[1:]):
            self.assertEqual(word["first"] + word["tokens"], following["first"])
        # White space belongs to the word after it; at the text's end to the last.
        by_index = {row["index"]: row["piece"] for row in value["per_token"]}
        for word in words[1:]:
            self.assertIn(by_index[word["first"]][0], "▁\n")
        path = self.folder / "words.csv"
        gemma("surprisal", *model("text"), "-p", TEXT, "--words", "--csv", path)
        with path.open(newline="") as file:
            self.assertEqual([row["word"] for row in csv.DictReader(file)], TEXT.split())
        self.assertIn("no tokenizer", error("surprisal", *model("ids"), "--ids", IDS, "--words"))

    def test_page(self):
        path = self.folder / "page.html"
        gemma("surprisal", *model("text"), "-p", TEXT, "--html", path)
        page = path.read_text(encoding="utf-8")
        value = self.surprisal(name="text", source=("-p", TEXT))
        self.assertEqual(page.count(" expected, rank "), value["tokens"])
        self.assertEqual(page.count('title="not scored"'), 1)  # <bos>
        for word in ("<script", "http:", "https:", " src="):
            self.assertNotIn(word, page)

    def test_text(self):
        shown = gemma("surprisal", *model("ids"), "--ids", IDS).stdout.splitlines()
        self.assertEqual(len(shown), 38)
        self.assertIn("rank", shown[0])

    def test_errors_leave_no_file(self):
        run = ("surprisal", *model("ids"), "--csv", self.folder / "x", "--html", self.folder / "y")
        self.assertIn("at least 2 tokens, got 1", error(*run, "--ids", "2"))
        self.assertIn("expected 0 or at least 4", error(*run, "--ids", IDS, "-c", 3))
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    cli.main()
