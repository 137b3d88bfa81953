#!/usr/bin/env python3
"""gemma lens, attention, attribute and saliency from outside: fields, texts, pages, errors.

python3 tests/test_lens_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import math
import pathlib
import re
import signal
import struct
import subprocess
import tempfile
import time
import unittest
import xml.etree.ElementTree

import test_cli as cli
from test_cli import A, ABC, BOS, PROMPT_IDS, error, gemma, model, one_object
from test_patch_cli import Page

LAYERS, HEADS, TOKENS, NEURONS = 2, 2, 7, 32
IDS = [int(i) for i in PROMPT_IDS.split(",")]
LONG = ",".join(["2"] + [str(12 + 7 * i % 250) for i in range(199)])
REAL_LAYERS = 18  # of the model whose pages count


def tensors(path):
    """A safetensors file: name -> (shape, values)."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            letter = {"F32": "f", "F64": "d", "I64": "q"}[entry["dtype"]]
            begin, end = entry["data_offsets"]
            form = f"<{(end - begin) // struct.calcsize(letter)}{letter}"
            found[name] = (entry["shape"], struct.unpack_from(form, data, 8 + length + begin))
    return found


class ExplainTest(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_ids(self, command, *more):
        return one_object(command, *model("ids"), "--ids", PROMPT_IDS, *more)

    def wrong(self, command, *more, code=1):
        return error(command, *model("ids"), "--ids", PROMPT_IDS, *more, code=code)

    def page(self, command, *more, name="ids", ids=PROMPT_IDS):
        """A page and its parts, once it was seen to be whole and to need nothing else."""
        path = self.folder / "page.html"
        text = ("--ids", ids) if ids else ()
        gemma(command, *model(name), *text, *more, "--html", path)
        page = path.read_text(encoding="utf-8")
        found = Page(page)
        self.assertNotIn("script", found.tags)
        self.assertNotIn("link", found.tags)
        self.assertNotRegex(page, r"(?i)https?:|url\(|src=|href=|@import")
        svgs = re.findall(r"<svg.*?</svg>", page, re.S)
        for svg in svgs:
            xml.etree.ElementTree.fromstring(svg)
        return page, found, svgs

    def shared_refusals(self, command):
        self.assertIn("got fused", self.wrong(command, "--engine", "fused"))
        self.assertIn(
            "expected ids from 0 to 299, got 300", error(command, *model("ids"), "--ids", "2,300")
        )
        self.assertIn(f"[{command}] --engine", self.wrong(command, "--engine", "traced"))


class Lens(ExplainTest):
    def test_json(self):
        value = self.run_ids("lens", "--top", 3)
        names = "ids pieces depths top_ids top_pieces top_logits top_logprobs targets"
        self.fields(value, names + " target_logprobs target_ranks kl")
        self.assertEqual(value["ids"], IDS)
        self.assertEqual(value["depths"], ["embed", "0", "1"])
        self.assertIsNone(value["pieces"])
        self.assertIsNone(value["top_pieces"])
        self.assertEqual(value["targets"], [[i] for i in IDS[1:]] + [[None]])
        self.assertEqual([len(row) for row in value["kl"]], [TOKENS] * (LAYERS + 1))
        self.assertEqual(max(map(abs, value["kl"][-1])), 0)
        self.assertIsNone(value["target_ranks"][0][-1][0])
        self.assertIsNone(value["target_logprobs"][0][-1][0])
        self.assertGreaterEqual(value["target_ranks"][0][0][0], 1)
        plain = one_object(
            "logits", *model("ids"), "--ids", PROMPT_IDS, "--engine", "eager", "--top", 3
        )
        for i, row in enumerate(plain["top"]):
            self.assertEqual(value["top_ids"][-1][-1][i], row["id"])
            self.assertAlmostEqual(value["top_logits"][-1][-1][i], row["logit"], 4)
            self.assertAlmostEqual(value["top_logprobs"][-1][-1][i], row["logprob"], 4)

    def test_tokens(self):
        value = self.run_ids("lens", "--token-ids", "5,6,7", "--rows", 2)
        self.assertEqual(value["targets"], [[5, 6, 7]] * TOKENS)
        self.assertEqual(len(value["target_ranks"][1][6]), 3)

    def test_text(self):
        run = ("lens", *model("text"), "-p", "abc")
        lines = gemma(*run, "--tokens", "a,abc", "--pos", 0).stdout.splitlines()
        self.assertIn("over 2 positions", lines[0])
        self.assertIn("after position 0 <bos>", lines[0])
        self.assertRegex(lines[1], r"rank, p a +rank, p abc$")
        self.assertEqual(len(lines), 2 + LAYERS + 1)
        self.assertRegex(lines[2], r"^embed \| +\d+\.\d{4} +\d+\.\d % \| .* \d+ +[01]\.\d{4}$")
        self.assertRegex(lines[4], r"^    1 \| +0\.0000    100\.0 % \| ")
        self.assertIn("after position 1 abc", gemma(*run).stdout)

    def test_page(self):
        page, found, svgs = self.page("lens")
        self.assertEqual(len(svgs), 6)
        for svg in svgs[1::2]:
            self.assertEqual(svg.count("<path "), (LAYERS + 1) * TOKENS)
        self.assertIn("Likeliest next token", found.text)
        self.assertIn("Rank of the token that follows", found.text)
        top = self.run_ids("lens")["top_ids"]
        self.assertIn(f">{top[1][2][0]}</text>", svgs[1])
        ranks = self.run_ids("lens")["target_ranks"]
        self.assertIn(f">{ranks[1][2][0]}</text>", svgs[3])
        _, found, svgs = self.page("lens", "--token-ids", "5,6")
        self.assertEqual(len(svgs), 8)
        self.assertIn("Rank of 6", found.text)
        _, found, _ = self.page("lens", "-p", "a<b>", "--tokens", "a", name="text", ids="")
        self.assertNotIn("b", found.tags)

    def test_a_long_prompt_s_page_is_small(self):
        page, _, _ = self.page("lens", ids=LONG)
        cells = re.findall(r"<path .*?</path>(?:<text.*?</text>)?", page)
        self.assertEqual(len(cells), 3 * (LAYERS + 1) * 200)
        per_row = sum(len(cell.encode()) for cell in cells) / (LAYERS + 1)
        pieces = 9 * 200 * (REAL_LAYERS + 1)  # longer than the ids that stand here
        self.assertLess(len(page) + per_row * (REAL_LAYERS - LAYERS) + pieces, 2e6)

    def test_refusals(self):
        self.shared_refusals("lens")
        self.assertIn("[lens] top: expected 1 to 300, got 0", self.wrong("lens", "--top", 0))
        self.assertIn("[lens] rows", self.wrong("lens", "--rows", 0))
        self.assertIn("position: expected -7 to 6, got 7", self.wrong("lens", "--pos", 7))
        self.assertIn("[lens] tokens: expected ids", self.wrong("lens", "--token-ids", 300))


class Attention(ExplainTest):
    def test_json(self):
        value = self.run_ids("attention")
        self.fields(value, "ids pieces heads")
        self.assertEqual(len(value["heads"]), LAYERS * HEADS)
        for row in value["heads"]:
            self.fields(row, "layer head first previous self entropy")
            self.assertLess(row["first"] + row["self"], 1.5)
            self.assertTrue(0 < row["entropy"] < math.log(TOKENS))
        some = self.run_ids("attention", "--layers", "1", "--heads", "1,0")["heads"]
        self.assertEqual(some, value["heads"][2:])

    def test_text(self):
        shown = gemma("attention", *model("ids"), "--ids", PROMPT_IDS, "--heads", 1).stdout
        self.assertRegex(shown, r"\n +0 +1 +0\.\d{3} +0\.\d{3} +0\.\d{3} +\d\.\d{3}\n +1 +1 ")

    def test_from_a_position(self):
        heads = self.run_ids("attention", "--from=-1")["heads"]
        weights = heads[1]["weights"]
        self.assertEqual(len(weights), TOKENS)
        self.assertAlmostEqual(sum(weights), 1, places=5)
        best = max(range(TOKENS), key=weights.__getitem__)
        shown = gemma("attention", *model("ids"), "--ids", PROMPT_IDS, "--from=-1").stdout
        token = PROMPT_IDS.split(",")[best]
        self.assertIn(f"layer  0 head 1  {weights[best]:.3f} {token}, ", shown)
        self.assertEqual(len(shown.splitlines()), 1 + LAYERS * HEADS)
        self.assertIn("expected -", self.wrong("attention", "--from", str(TOKENS)))

    def test_page(self):
        page, found, svgs = self.page("attention", "--layers", 1)
        self.assertEqual(len(svgs), 1 + HEADS)
        self.assertEqual(found.tags.count("h2"), 1)
        self.assertIn("Layer 1, full attention", found.text)
        for svg in svgs[1:]:  # what a row tells, and the labels
            self.assertEqual(svg.count("<title>"), TOKENS)
            self.assertIn("<title>2: 2 1.00</title>", svg)
            self.assertEqual(svg.count(">269</text>"), 2)
        page, found, svgs = self.page("attention")
        self.assertIn("Layer 0, sliding window of 8 tokens", found.text)
        self.assertEqual(len(svgs), 1 + LAYERS * HEADS)

    def test_cells_are_where_the_weights_are(self):
        """The runs of a picture, drawn again, are the levels of the captured pattern."""
        file = self.folder / "x.safetensors"
        sites = ("--sites", "blocks.0.pattern", "-o", file)
        gemma("capture", *model("ids"), "--ids", PROMPT_IDS, *sites)
        (_, heads, side, _), weights = tensors(file)["blocks.0.pattern"]
        _, _, svgs = self.page("attention", "--layers", 0)
        for head in range(heads):
            drawn = [[0] * side for _ in range(side)]
            paths = re.findall(r'<path stroke="(#\w+)" d="M0 .5(.*?)"', svgs[1 + head])
            legend = re.findall(r'fill="(#\w+)"', svgs[0])
            for colour, path in paths:
                x = y = 0
                for right, down, length in re.findall(r"m(-?\d+) (\d+)h(\d+)", path):
                    x, y = x + int(right), y + int(down)
                    for _ in range(int(length)):
                        drawn[y][x] = legend.index(colour)
                        x += 1
            at = head * side * side
            want = [
                [int(10 * math.sqrt(weights[at + y * side + x]) + 1e-6) for x in range(side)]
                for y in range(side)
            ]
            self.assertEqual(drawn, want)

    def test_a_long_prompt_s_page_is_small(self):
        page, _, _ = self.page("attention", ids=LONG)
        self.assertEqual(page.count("<title>"), 1 + LAYERS * HEADS * 200)
        page = re.sub("<rect fill-opacity.*?</rect>", "", page)  # 72 maps leave those out
        self.assertLess(len(page.encode()) * (REAL_LAYERS * 4) / (LAYERS * HEADS), 2e6)
        page, _, _ = self.page("attention", ids=",".join(["2"] * 800))  # so do 3,200 rows
        self.assertEqual(page.count("<title>"), 1)
        self.assertIn("A cell is the largest of 4 x 4 weights.", page)

    def test_refusals(self):
        self.shared_refusals("attention")
        self.assertIn("layers: expected 0 to 1, got 2", self.wrong("attention", "--layers", "0,2"))
        self.assertIn("at least 2 tokens", error("attention", *model("ids"), "--ids", "2"))


class Attribute(ExplainTest):
    def test_json(self):
        value = self.run_ids("attribute", "--token-ids", "5,6")
        names = "ids pieces position tokens less_mean value sum residual embed attn heads mlp"
        self.fields(value, names + " neurons activations")
        self.assertEqual(value["position"], TOKENS - 1)
        self.assertEqual(value["tokens"], [{"id": 5, "piece": None}, {"id": 6, "piece": None}])
        self.assertEqual([len(row) for row in value["heads"]], [HEADS] * LAYERS)
        self.assertEqual([len(row) for row in value["neurons"]], [NEURONS] * LAYERS)
        parts = value["embed"] + sum(map(sum, value["heads"])) + sum(map(sum, value["neurons"]))
        self.assertAlmostEqual(parts, value["value"], 4)
        self.assertAlmostEqual(parts, value["sum"], 6)
        self.assertAlmostEqual(value["embed"] + sum(value["attn"]) + sum(value["mlp"]), parts, 4)
        self.assertAlmostEqual(value["residual"], value["value"] - value["sum"], 9)
        plain = one_object(
            "logits", *model("ids"), "--ids", PROMPT_IDS, "--engine", "eager", "--top", 300
        )
        logit = {row["id"]: row["logit"] for row in plain["top"]}
        self.assertAlmostEqual(value["value"], logit[5] - logit[6], 4)
        best = self.run_ids("attribute")
        self.assertEqual(best["tokens"][0]["id"], plain["top"][0]["id"])
        less = self.run_ids("attribute", "--less-mean")
        self.assertAlmostEqual(less["value"], best["value"] - sum(logit.values()) / 300, 4)
        self.assertLess(abs(less["residual"]), 1e-4)

    def test_text(self):
        run = ("attribute", *model("text"), "-p", "abc", "--tokens", "a,abc", "--top", 3)
        shown = gemma(*run).stdout
        self.assertRegex(shown, r"^logit a \u2212 abc after position 1 abc: -?\d+\.\d{4}\n")
        self.assertRegex(shown, r"\nlargest of 4 heads, 2 MLPs and the embedding:\n")
        self.assertRegex(
            shown, r"\n +-?\d\.\d{4}  layer +\d neuron +\d+, activation -?\d+\.\d{3}\n"
        )
        self.assertRegex(shown, r"residual -?\d\.\d\de-\d\d; with MLPs and attention whole -?\d\.")
        rows = re.findall(r"^ +(-?\d+\.\d{4})  ", shown, re.M)
        self.assertEqual(len(rows), 6)
        for group in (rows[:3], rows[3:]):
            sizes = [abs(float(row)) for row in group]
            self.assertEqual(sizes, sorted(sizes, reverse=True))

    def test_page(self):
        page, found, svgs = self.page("attribute", "--token-ids", "5")
        self.assertEqual(
            [svg.count("<path ") for svg in svgs[1::2]], [LAYERS * (HEADS + 1), LAYERS * 12]
        )
        value = self.run_ids("attribute", "--token-ids", "5")
        for layer in range(LAYERS):
            best = max(range(NEURONS), key=lambda n: abs(value["neurons"][layer][n]))
            self.assertIn(f">{best}</text>", svgs[3])
        self.assertIn(f"layer 1, mlp: {value['mlp'][1]:.4f}", svgs[1])

    def test_refusals(self):
        self.shared_refusals("attribute")
        both = self.wrong("attribute", "--token-ids", "5,6", "--less-mean")
        self.assertIn("[attribute] mean: expected one token", both)
        self.assertIn("expected 1 to 2, got 3", self.wrong("attribute", "--token-ids", "5,6,7"))
        self.assertIn("--top", self.wrong("attribute", "--top", 0))
        self.assertIn("position: expected", self.wrong("attribute", "--pos", -8))


class Saliency(ExplainTest):
    def test_integrated(self):
        value = self.run_ids("saliency", "--token-ids", "5")
        names = "ids pieces of method tokens position value scores baseline baseline_value steps"
        self.fields(value, names + " completeness_error")
        self.assertEqual(
            (value["of"], value["method"], value["baseline"]), ("logit", "integrated", "pad")
        )
        whole = value["value"] - value["baseline_value"]
        self.assertLess(abs(sum(value["scores"]) - whole), 0.01 * abs(whole))
        error = abs(sum(value["scores"]) - whole) / abs(whole)
        self.assertAlmostEqual(value["completeness_error"], error, 9)
        self.assertEqual(value["scores"][0], 0)
        # The baseline's own run: every token but the first is <pad>, 0.
        padded = ",".join([str(IDS[0])] + ["0"] * (TOKENS - 1))
        plain = one_object(
            "logits", *model("ids"), "--ids", padded, "--engine", "eager", "--top", 300
        )
        logit = {row["id"]: row["logit"] for row in plain["top"]}
        self.assertAlmostEqual(value["baseline_value"], logit[5], 4)
        all_of_it = self.run_ids("saliency", "--token-ids", "5", "--replace-first")
        self.assertNotEqual(all_of_it["scores"][0], 0)
        zero = self.run_ids("saliency", "--token-ids", "5", "--baseline", "zero", "--replace-first")
        self.assertEqual(zero["baseline_value"], 0)
        mean = self.run_ids("saliency", "--token-ids", "5", "--baseline", "mean", "--steps", 17)
        self.assertEqual(mean["steps"], 17)

    def test_gradient(self):
        file = self.folder / "x.safetensors"
        run = ("--method", "gradient", "--token-ids", "5,6", "--pos", 3, "--of", "logprob")
        value = self.run_ids("saliency", *run, "-o", file)
        names = "ids pieces of method tokens position value scores gradient_norms"
        self.fields(value, names)
        found = tensors(file)
        self.assertEqual(
            {name: shape for name, (shape, _) in found.items()},
            {"scores": [TOKENS], "embed": [TOKENS, 16], "gradient": [TOKENS, 16]},
        )
        for t in range(TOKENS):
            at = slice(16 * t, 16 * t + 16)
            gradient, embed = found["gradient"][1][at], found["embed"][1][at]
            self.assertAlmostEqual(
                value["scores"][t], sum(a * b for a, b in zip(gradient, embed)), 5
            )
            self.assertAlmostEqual(value["gradient_norms"][t], math.hypot(*gradient), 5)
        self.assertEqual(value["scores"][4:], [0, 0, 0])  # after the position
        plain = one_object(
            "logits", *model("ids"), "--ids", ",".join(map(str, IDS[:4])), "--top", 300
        )
        logprob = {row["id"]: row["logprob"] for row in plain["top"]}
        self.assertAlmostEqual(value["value"], logprob[5] - logprob[6], 4)

    def test_loss(self):
        value = self.run_ids("saliency", "--of", "loss", "--method", "gradient")
        plain = one_object(
            "perplexity", *model("ids"), "--ids", PROMPT_IDS, "-c", 0, "--engine", "eager"
        )
        self.assertAlmostEqual(value["value"], plain["nll"], 4)
        self.assertEqual(value["tokens"], [])
        self.assertEqual(value["scores"][-1], 0)  # predicted, never read

    def test_text(self):
        run = ("saliency", *model("text"), "-p", "abc", "--tokens", "a")
        shown = gemma(*run).stdout
        self.assertRegex(
            shown, r"^logit a after position 1 abc\nintegrated gradients, pad baseline but "
        )
        self.assertRegex(
            shown, r" \(\d\.\d\d % off\) after \d+ gradients\n     0    0\.0000  <bos>\n"
        )
        shown = gemma(*run, "--method", "gradient", "--of", "logprob").stdout
        self.assertRegex(shown, r"^log-probability a after position 1 abc\ngradient x input, where it is -\d")
        shown = gemma(*run[:-2], "--of", "loss").stdout
        self.assertRegex(shown, r"^loss of the text\n")

    def test_page(self):
        run = ("-p", "a<b> abc", "--tokens", "a")
        page, found, _ = self.page("saliency", *run, name="text", ids="")
        value = one_object("saliency", *model("text"), *run)
        spans = re.findall(r'<span[^>]*title="(.*?)">', page)
        self.assertEqual(len(spans), len(value["ids"]))
        for i, (span, score) in enumerate(zip(spans, value["scores"])):
            self.assertTrue(span.startswith(f"{i}: {score:.4f}, "))
        self.assertNotIn("b", found.tags)
        page, _, _ = self.page("saliency", "--method", "gradient", ids=LONG)
        self.assertLess(len(page), 1e5)

    def test_refusals(self):
        self.shared_refusals("saliency")
        loss = self.wrong("saliency", "--of", "loss", "--token-ids", "5")
        self.assertIn("--tokens: expected none with --of loss", loss)
        self.assertIn("--of", self.wrong("saliency", "--of", "entropy", code=2))
        self.assertIn("--method", self.wrong("saliency", "--method", "guided", code=2))
        self.assertIn("--baseline", self.wrong("saliency", "--baseline", "bos", code=2))
        self.assertIn("steps: expected at least 17, got 16", self.wrong("saliency", "--steps", 16))
        self.assertIn("position: expected -7 to 6, got 9", self.wrong("saliency", "--pos", 9))

    def test_ctrl_c_leaves_nothing(self):
        page = self.folder / "page.html"
        more = ["--tolerance", "0", "--steps", "100000", "--batch-tokens", "1", "--html", page]
        command = [cli.GEMMA, "saliency", *map(str, model("ids")), "--ids", LONG, *more]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(2)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=300)
        self.assertRegex(err, r"^gemma: error: \[saliency\] stopped after \d+ gradients, nothing")
        self.assertEqual((run.returncode, out), (1, ""))
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    cli.main()
