#!/usr/bin/env python3
"""gemma steer from outside: directions from pairs, both files, steered text, measures, the page.

    python3 tests/test_steer_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import math
import pathlib
import re
import struct
import tempfile
import unittest

import test_cli as cli
from test_cli import GENERATE_FIELDS, PROMPT_IDS, error, gemma, model, one_object
from test_patch_cli import Page, tensor_file

WIDTH, LAYERS = 16, 2
PAIRS = [([2, 12, 13, 14], [2, 30, 31]), ([2, 50, 51], [2, 60, 61, 62])]
GREEDY = ("-n", 6, "--greedy", "--seed", 1)


class SteerTest(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        lines = [json.dumps({"positive": a, "negative": b}) for a, b in PAIRS]
        self.pairs = self.write("pairs", "\n".join(lines) + "\n")

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def make(self, *more, name="ids", pairs=None):
        self.out = self.folder / "direction"
        pairs = pairs or self.pairs
        return one_object("steer", "make", *model(name), "--pairs", pairs, "-o", self.out, *more)

    def steer(self, what, *more):
        return one_object("steer", what, *model("ids"), "--direction", self.out, *more)

    def wrong(self, what, *more, code=1):
        return error("steer", what, *model("ids"), *more, code=code)


class Make(SteerTest):
    def test_json(self):
        value = self.make("--layers", "0-1")
        self.fields(value, "out format site method pool pairs layers")
        self.assertEqual([row["layer"] for row in value["layers"]], [0, 1])
        self.assertEqual((value["pairs"], value["site"]), (2, "resid_post"))
        for row in value["layers"]:
            self.fields(row, "layer norm agree explained")
            self.assertGreater(row["norm"], 0)
        shown = gemma("steer", "make", *model("ids"), "--pairs", self.pairs, "-o", self.out).stdout
        self.assertIn("mean of 2 pairs at resid_post", shown)

    def test_texts_are_prompts_as_anywhere(self):
        text = self.write("t", '{"positive": "abc", "negative": "ab"}\n')
        by_text = self.make(name="text", pairs=text)["layers"]
        encoded = [one_object("tokenize", *model("text"), "-p", t)["ids"] for t in ("abc", "ab")]
        ids = self.write("i", json.dumps(dict(zip(("positive", "negative"), encoded))))
        self.assertEqual(self.make(name="text", pairs=ids)["layers"], by_text)

    def test_methods_and_pools_differ(self):
        found = set()
        for method in ("mean", "pca"):
            for pool in ("last", "mean"):
                value = self.make("--method", method, "--pool", pool)
                found.add(value["layers"][1]["norm"])
        self.assertEqual(len(found), 4)

    def test_a_mean_direction_is_of_last_values(self):
        """Recomputed from what `capture` saves."""
        self.make("--layers", "1")

        def last(path):
            return struct.unpack(f"<{WIDTH}f", path.read_bytes()[-4 * WIDTH :])

        def captured(ids):
            ids, out = ",".join(map(str, ids)), self.folder / "x"
            run = ("--ids", ids, "--sites", "blocks.1.resid_post", "-o", out)
            gemma("capture", *model("ids"), *run)
            return last(out)

        sides = [[captured(ids) for ids in pair] for pair in PAIRS]
        for i, value in enumerate(last(self.out)):
            want = sum(positive[i] - negative[i] for positive, negative in sides) / len(PAIRS)
            self.assertAlmostEqual(value, want, 4)

    def test_pools_see_what_they_say(self):
        """At layer 0's attn_in a token's value is its own alone."""
        run = ("-o", self.folder / "x", "--site", "attn_in", "--layers", "0")
        for pool, negative in (("last", [2, 30, 13]), ("mean", [13, 12])):  # 2 is BOS
            line = json.dumps({"positive": [2, 12, 13], "negative": negative})
            same = ("--pairs", self.write("same", line), "--pool", pool)
            self.assertIn("pairs that differ", self.wrong("make", *run, *same))

    def test_llama_cpp_s_file(self):
        value = self.make("--format", "gguf")
        self.assertEqual([row["layer"] for row in value["layers"]], [1])  # it has no layer 0
        self.assertEqual(self.out.read_bytes()[:4], b"GGUF")
        run = ("--ids", PROMPT_IDS, *GREEDY)
        from_gguf = self.steer("generate", *run)["ids"]
        self.make("--layers", "1")
        self.assertEqual(self.steer("generate", *run)["ids"], from_gguf)
        bad = ("--pairs", self.pairs, "-o", self.folder / "x", "--format", "gguf")
        self.assertIn("layer 0", self.wrong("make", *bad, "--layers", "0,1"))
        self.assertIn("mlp_out", self.wrong("make", *bad, "--site", "mlp_out"))

    def test_refusals(self):
        out = ("-o", self.folder / "x")

        def pairs(text):
            return self.wrong("make", "--pairs", self.write("p", text), *out)

        good = json.dumps({"positive": [2, 5], "negative": [2, 6]})
        for text, why in (
            ('{"positive": [2]}', 'p line 1: expected an object with "positive"'),
            (good + "\n\n", "p line 2: expected a pair, got an empty"),
            ('{"positive": 5, "negative": [2]}', "a text or a list of token ids, got 5"),
            ('{"positive": [null], "negative": [2]}', "a list of token ids, got null"),
            ('{"positive": "a", "negative": "b"}', "no tokenizer"),
            ('{"positive": [300], "negative": [2]}', "pair 0: expected ids from 0 to 299, got 300"),
            ('{"positive": [], "negative": [2]}', "pair 0: expected at least one token"),
            ('{"positive": [2], "negative": [2]}', "pairs that differ"),
            ("", "empty file"),
        ):
            self.assertIn(why, pairs(text))
        run = ("--pairs", self.pairs, *out)
        self.assertIn("got 2", self.wrong("make", *run, "--layers", "2"))
        self.assertIn('"1-"', self.wrong("make", *run, "--layers", "1-"))
        self.assertIn("after the dash", self.wrong("make", *run, "--layers", "1-0"))
        self.assertIn('"x"', self.wrong("make", *run, "--layers", "x"))
        self.assertIn("got zz", self.wrong("make", *run, "--site", "zz"))
        self.assertIn("without heads", self.wrong("make", *run, "--site", "z"))
        self.assertIn("--method", self.wrong("make", *run, "--method", "x", code=2))
        self.assertIn("got fused", self.wrong("make", *run, "--engine", "fused"))
        self.assertIn("[usage]", error("steer", code=2))
        self.assertFalse((self.folder / "x").exists())


class Generate(SteerTest):
    def test_json(self):
        self.make()
        value = self.steer("generate", "--ids", PROMPT_IDS, *GREEDY, "--strength", 3)
        self.fields(value, GENERATE_FIELDS + " direction layers strength keep_norm")
        self.assertEqual((value["strength"], value["engine"]), (3, "eager"))
        self.assertEqual(value["layers"], [])

    def test_strength_0_is_the_model_itself(self):
        self.make()
        plain = one_object("generate", *model("ids"), "--ids", PROMPT_IDS, *GREEDY)["ids"]
        run = ("--ids", PROMPT_IDS, *GREEDY)
        self.assertEqual(self.steer("generate", *run, "--strength", 0)["ids"], plain)
        self.assertNotEqual(self.steer("generate", *run, "--strength=-40")["ids"], plain)

    def test_keep_norm_only_turns(self):
        self.make()
        run = ("--ids", PROMPT_IDS, *GREEDY, "--strength=-3")
        turned = self.steer("generate", *run, "--keep-norm")
        self.assertTrue(turned["keep_norm"])
        self.assertNotEqual(self.steer("generate", *run)["ids"], turned["ids"])

    def test_a_direction_does_what_a_direction_says(self):
        """A vector at the last layer's resid_post moves the logits by the head's row of it."""
        logits = self.logits({"direction.1": [0.0] * WIDTH})
        moved = self.logits({"direction.1": [5.0] + [0.0] * (WIDTH - 1)})
        self.assertNotEqual(logits, moved)

    def logits(self, vectors):
        self.out = tensor_file(self.folder / "d", **{k: ([WIDTH], v) for k, v in vectors.items()})
        run = ("--ids", PROMPT_IDS, "--token-ids", "5", "--against-ids", "6", "--strengths", 1)
        return self.steer("measure", *run)["rows"][0]["mean"]

    def test_text_and_stop(self):
        self.make(name="text")
        run = ("steer", "generate", *model("text"), "--direction", self.out, "-p", "abc", *GREEDY)
        text = one_object(*run)["text"]
        self.assertEqual(gemma(*run).stdout, text + "\n")
        stop = text[1:3]
        cut = one_object(*run, "--stop", stop)
        want = (text[: text.index(stop)], "stop_string")
        self.assertEqual((cut["text"], cut["finish_reason"]), want)
        self.assertEqual(one_object(*run, "--stop", text[-1] + "~")["text"], text)  # held back

    def test_refusals(self):
        run = ("--ids", PROMPT_IDS)
        self.make("--layers", "1")
        more = ("--direction", self.out, *run)
        wrong = self.wrong("generate", *more, "--layers", "0-1")
        self.assertIn("layer 0: expected one that the direction has a vector for, 1 to 1", wrong)
        self.assertIn("--strength", self.wrong("generate", *more, "--strength", "x", code=2))
        wrong = self.wrong("generate", *more, "--strength", "inf")
        self.assertIn("strength: expected a number", wrong)
        self.assertIn("got fused", self.wrong("generate", *more, "--engine", "fused"))
        self.assertIn("--direction", self.wrong("generate", *run, code=2))
        self.assertIn("/nowhere", self.wrong("generate", *run, "--direction", "/nowhere"))
        narrow = tensor_file(self.folder / "n", **{"direction.1": ([4], [1, 2, 3, 4])})
        wrong = self.wrong("generate", *run, "--direction", narrow)
        self.assertIn("blocks.1.resid_post: expected (16), got (4)", wrong)
        weights = cli.MODELS / "ids" / "model.safetensors"
        wrong = self.wrong("generate", *run, "--direction", weights)
        self.assertIn("expected tensors called direction.LAYER", wrong)


class Measure(SteerTest):
    RUN = ("--token-ids", "5,7", "--against-ids", "6")

    def prompts(self):
        return self.write("prompts", json.dumps([2, 12, 13]) + "\n" + json.dumps([2, 70]) + "\n")

    def measure(self, *more):
        run = ("--prompts-jsonl", self.prompts(), *self.RUN)
        return self.steer("measure", *run, *more)

    def test_json(self):
        self.make()
        run = ("--strengths", "-2,0,2.5", "--keep-norm")
        every = self.measure(*run)
        value = self.measure(*run, "--layers", "1")
        self.fields(value, "direction layers keep_norm tokens against prompts rows grows")
        self.assertEqual((value["layers"], value["keep_norm"]), ([1], True))
        self.assertNotEqual(value["rows"], every["rows"])
        self.assertNotEqual(self.measure(*run[:2])["rows"], every["rows"])
        self.make("--layers", "1")
        self.assertEqual(self.measure(*run)["rows"], value["rows"])
        self.assertEqual([token["id"] for token in value["tokens"]], [5, 7])
        self.assertEqual([token["id"] for token in value["against"]], [6])
        self.assertEqual([p["ids"] for p in value["prompts"]], [[2, 12, 13], [2, 70]])
        self.assertEqual([row["strength"] for row in value["rows"]], [-2, 0, 2.5])
        means = [row["mean"] for row in value["rows"]]
        self.assertEqual(value["grows"], means[0] < means[1] < means[2])
        for row in value["rows"]:
            self.fields(row, "strength mean kl scores")
            self.assertAlmostEqual(sum(row["scores"]) / 2, row["mean"], 9)
        self.assertEqual(value["rows"][1]["kl"], 0)
        for ids, score in zip(("2,12,13", "2,70"), value["rows"][1]["scores"]):
            run = ("logits", *model("ids"), "--ids", ids, "--top", 300, "--engine", "eager")
            p = {row["id"]: math.exp(row["logprob"]) for row in one_object(*run)["top"]}
            self.assertAlmostEqual(score, math.log((p[5] + p[7]) / p[6]), 4)

    def test_page(self):
        self.make()
        page = self.folder / "page.html"
        self.measure("--strengths", "2,-2,0", "--html", page)
        text = page.read_text(encoding="utf-8")
        found = Page(text)
        for word in ("script", "link", "img"):
            self.assertNotIn(word, found.tags)
        self.assertNotRegex(text, r"(?i)(src|href)=|url\(|@import|https?:")
        self.assertIn("2,12,13", found.text)
        self.assertEqual(text.count("<circle"), 3)
        self.assertEqual(found.tags.count("li"), 2)
        order = [float(x) for x in text.split("<circle")[1:] for x in [x.split('"')[1]]]
        self.assertEqual(order, sorted(order))  # strengths from the left
        lines = re.findall(r'<path fill="none" [^>]* d="([^"]*)"', text)
        self.assertEqual(len(set(lines)), 3)  # two prompts and their mean

    def test_text(self):
        self.make()
        run = ("steer", "measure", *model("ids"), "--direction", self.out, *self.RUN)
        shown = gemma(*run, "--prompts-jsonl", self.prompts(), "--strengths", "0,1").stdout
        self.assertIn("ln P(5 7) / P(6) after 2 prompts", shown)
        rows = self.measure("--strengths", "0,1")["rows"]
        self.assertEqual(len(shown.splitlines()), 2 + len(rows))
        for line, row in zip(shown.splitlines()[2:], rows):
            want = (row["strength"], row["mean"], *sorted(row["scores"]), row["kl"])
            for number, value in zip(line.split(), want):
                self.assertAlmostEqual(float(number), value, 3)

    def test_refusals(self):
        self.make()
        run = ("--direction", self.out, "--ids", PROMPT_IDS)
        strengths = ("--strengths", "1,2")
        self.assertIn("--strengths", self.wrong("measure", *run, *self.RUN, code=2))
        self.assertIn("tokens: expected", self.wrong("measure", *run, *strengths))
        more = (*run, *strengths, "--token-ids", "5")
        self.assertIn("tokens against: expected", self.wrong("measure", *more))
        self.assertIn("got 300", self.wrong("measure", *more, "--against-ids", "300"))
        both = self.wrong("measure", *more, "--against-ids", "5", "--against", "a")
        self.assertIn("--against or --against-ids, got both", both)
        self.assertIn("--against-ids", self.wrong("measure", *more, "--against", "a"))


if __name__ == "__main__":
    cli.main()
