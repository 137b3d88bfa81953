#!/usr/bin/env python3
"""gemma patch from outside: edits and their grammar, sweeps, the page, errors.

    python3 tests/test_patch_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import html.parser
import json
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

LAYERS, HEADS, TOKENS = 2, 2, 7
OTHER_IDS = "2,269,270,9,272,10,11"


def tensor_file(path, **tensors):
    """A safetensors file of float32 tensors: name=(shape, values)."""
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        begin = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        offsets = [begin, len(data)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


class Page(html.parser.HTMLParser):
    """Every element opened is closed; collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


class PatchTest(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def patch(self, *more, name="ids"):
        return one_object("patch", *model(name), "--ids", PROMPT_IDS, *more)

    def wrong(self, *more, code=1):
        return error("patch", *model("ids"), "--ids", PROMPT_IDS, *more, code=code)


class Edits(PatchTest):
    def after(self, *edits, more=("--seed", 1)):
        flags = [word for edit in edits for word in ("--edit", edit)]
        return self.patch(*flags, "--top", 300, *more)["after"]

    def test_json(self):
        value = self.patch("--edit", "blocks.*.attn_out=zero", "--token-ids", "5,6", "--top", 3)
        self.fields(value, "ids pieces other_ids edits sites seed tokens before after kl")
        self.assertEqual(value["sites"], ["blocks.0.attn_out", "blocks.1.attn_out"])
        self.assertEqual(value["ids"], [int(i) for i in PROMPT_IDS.split(",")])
        self.assertEqual(value["tokens"], [5, 6])
        self.assertGreater(value["kl"], 0)
        for side in ("before", "after"):
            self.fields(value[side], "score top")
            self.assertEqual(len(value[side]["top"]), 3)
            self.fields(value[side]["top"][0], "id piece logit logprob")
        self.assertNotEqual(value["before"]["score"], value["after"]["score"])
        plain = one_object("logits", *model("ids"), "--ids", PROMPT_IDS, "--engine", "eager")
        for ours, row in zip(value["before"]["top"], plain["top"]):
            self.assertEqual(ours["id"], row["id"])
            self.assertAlmostEqual(ours["logit"], row["logit"], 4)

    def test_score(self):
        edit = ("--edit", "embed[pos=3]=zero", "--top", 300)
        value = self.patch(*edit, "--token-ids", "5,6")
        for side in ("before", "after"):
            logit = {row["id"]: row["logit"] for row in value[side]["top"]}
            self.assertAlmostEqual(value[side]["score"], logit[5] - logit[6], 6)
            one = self.patch(*edit, "--token-ids", "6")[side]["score"]
            self.assertAlmostEqual(one, logit[6], 6)
            self.assertIsNone(self.patch(*edit)[side]["score"])

    def test_text(self):
        run = ("patch", *model("text"), "-p", "abc", "--edit", "blocks.1.resid_post=zero")
        shown = gemma(*run, "--tokens", "a,abc").stdout
        self.assertRegex(shown, r"^edited: blocks\.1\.resid_post\nnext token before +and after\n")
        self.assertRegex(shown, r'\n +\d+\.\d{3} % "[^\n]* +\d\.\d{3} % "')
        self.assertRegex(
            shown,
            r"\nlogit difference -?\d+\.\d{4} before, 0\.0000 after\nKL \d\.\d{5}; seed \d+\n$",
        )
        value = one_object(*run, "--tokens", "a,abc")
        self.assertEqual(value["tokens"], [A, ABC])
        self.assertEqual(value["ids"], [BOS, ABC])

    def test_parts(self):
        """The last position's own value decides the next token: others of the last layer do not."""
        last = "blocks.1.resid_post"
        plain = self.patch("--edit", "embed=zero", "--top", 300)["before"]
        self.assertEqual(self.after(last + "[pos=0-5]=zero"), plain)
        zeroed = self.after(last + "=zero")
        self.assertNotEqual(zeroed, plain)
        parts = "[pos=6] [pos=-1] [pos=2,4-6] [channels=0-15] [channels=0-15][pos=6]"
        for same in parts.split():
            self.assertEqual(self.after(last + same + "=zero"), zeroed)
        self.assertNotEqual(self.after(last + "[channels=0-7]=zero"), zeroed)
        heads = [self.after(f"blocks.[01].z[head={head}]=zero") for head in range(HEADS)]
        self.assertNotEqual(heads[0], heads[1])
        both = self.after("blocks.?.z[head=0]=zero", "blocks.?.z[head=1]=zero")
        self.assertEqual(both, self.after("blocks.*.z=zero"))

    def test_fills(self):
        site = "blocks.0.mlp_out"
        zeros = self.after(f"{site}=zero")
        self.assertEqual(self.after(f"{site}=noise:0"), zeros)
        plain = self.patch("--edit", f"{site}=add_noise:0.0", "--top", 300)
        self.assertEqual(plain["after"], plain["before"])
        self.assertEqual(plain["kl"], 0)
        first = self.after(f"{site}=noise:2")
        self.assertEqual(self.after(f"{site}=noise:2"), first)
        self.assertNotEqual(self.after(f"{site}=noise:2", more=("--seed", 2)), first)
        self.assertNotEqual(self.after(f"{site}=mean"), zeros)
        other = ("--other-ids", OTHER_IDS)
        plain = one_object("logits", *model("ids"), "--ids", OTHER_IDS, "--engine", "eager")["top"]
        taken = self.after("blocks.1.resid_post=other", more=other)["top"]
        for ours, row in zip(taken, plain):
            self.assertEqual(ours["id"], row["id"])
            self.assertAlmostEqual(ours["logit"], row["logit"], 4)

    def test_files(self):
        captured = self.folder / "x.safetensors"
        sites = ("--sites", "blocks.*.mlp_out")
        gemma("capture", *model("ids"), "--ids", OTHER_IDS, *sites, "-o", captured)
        taken = self.after("blocks.*.mlp_out=other", more=("--other-ids", OTHER_IDS))
        self.assertEqual(self.after(f"blocks.*.mlp_out=file:{captured}"), taken)
        one = self.after("blocks.1.mlp_out=other", more=("--other-ids", OTHER_IDS))
        self.assertEqual(self.after(f"blocks.1.mlp_out=file:{captured}:blocks.1.mlp_out"), one)
        direction = tensor_file(self.folder / "d", up=([16], [0.0] * 16), bad=([3], [1, 2, 3]))
        zeros = self.after("blocks.1.mlp_out=zero")
        self.assertEqual(self.after(f"blocks.1.mlp_out=file:{direction}:up"), zeros)
        bad = self.wrong("--edit", f"blocks.1.mlp_out=file:{direction}:bad")
        self.assertIn("blocks.1.mlp_out: value: expected (1, 7, 16) or 1 along", bad)
        bad = self.wrong("--edit", f"blocks.1.mlp_out=file:{direction}")
        self.assertIn("has no tensor blocks.1.mlp_out", bad)
        self.assertIn("/nowhere", self.wrong("--edit", "embed=file:/nowhere:x"))

    def test_grammar(self):
        for edit, why in (
            ("embed", "expected SITE=FILL"),
            ("embed=", 'or file:PATH[:KEY], got ""'),
            ("embed=one", 'or file:PATH[:KEY], got "one"'),
            ("embed=zero:1", 'nothing after zero, got "1"'),
            ("embed=noise", 'noise:STD with a number of 0 or more, got ""'),
            ("embed=noise:-1", 'got "-1"'),
            ("embed=add_noise:1x", 'add_noise:STD with a number of 0 or more, got "1x"'),
            ("embed[pos=7]=zero", "pos: expected -7 to 6, got 7"),
            ("embed[pos=-8]=zero", "pos: expected -7 to 6, got -8"),
            ("embed[pos=]=zero", 'a number, got ""'),
            ("embed[pos=1,x]=zero", 'a number, got "x"'),
            ("embed[pos=3-1]=zero", "3 or more after the dash, got 1"),
            ("embed[row=1]=zero", "[pos=..], [head=..] or [channels=..], got [row=1]"),
            ("embed[pos=1]zero", '"=" or "[" after "]", got "zero"'),
            ("embed[pos=1", 'expected a "]"'),
            ("embed[pos=1]", "=FILL at the end"),
            ("embed[head=0]=zero", "embed: head: expected a site with heads"),
            ("blocks.0.z[head=2]=zero", "blocks.0.z: head: expected 0 to 1, got 2"),
            ("blocks.0.z[channels=0-99]=zero", "blocks.0.z: last channel: expected 0 to"),
            ("blocks.*.zz=zero", 'got "blocks.*.zz"'),
            ("embed=other", "expected --other, got none"),
        ):
            shown = self.wrong("--edit", edit)
            self.assertIn(why, shown)
            self.assertRegex(shown, r"^gemma: error: \[(edit|patch|sites)\] ")
        short = self.wrong("--edit", "embed=other", "--other-ids", "2,5")
        self.assertIn("or 1 along an axis, got (1, 2, 16). Hint: another prompt", short)

    def test_refusals(self):
        self.assertIn("--edit or --sweep", self.wrong(code=2))
        both = self.wrong("--edit", "embed=zero", "--sweep", "z", code=2)
        self.assertIn("--edit or --sweep", both)
        self.assertIn("--html", self.wrong("--edit", "embed=zero", "--html", "x", code=2))
        edit = ("--edit", "embed=zero")
        self.assertIn("got fused", self.wrong(*edit, "--engine", "fused"))
        self.assertIn("expected one or two, got 3", self.wrong(*edit, "--token-ids", "1,2,3"))
        self.assertIn("got 300", self.wrong(*edit, "--token-ids", "300"))
        self.assertIn("--top", self.wrong(*edit, "--top", 0))
        self.assertIn("--token-ids", self.wrong(*edit, "--tokens", "a"))  # no tokenizer
        self.assertIn("got both", self.wrong(*edit, "--tokens", "a", "--token-ids", "5"))
        run = ("patch", *model("text"), "-p", "abc", *edit, "--tokens")
        self.assertIn('"abcd": expected one token, got 2', error(*run, "a,abcd"))
        self.assertIn('"": expected one token, got 0', error(*run, "a,"))


class Sweeps(PatchTest):
    RUN = ("--corrupted-ids", OTHER_IDS, "--token-ids", "5,6")

    def test_json(self):
        value = self.patch("--sweep", "resid_post,z", "--sweep", "v", *self.RUN)
        names = "ids pieces corrupted_ids corrupted_pieces tokens clean corrupted maps"
        self.fields(value, names)
        self.assertEqual(value["corrupted_ids"], [int(i) for i in OTHER_IDS.split(",")])
        self.assertEqual(value["tokens"], [{"id": 5, "piece": None}, {"id": 6, "piece": None}])
        shapes = []
        for found in value["maps"]:
            self.fields(found, "site columns scores normalised")
            shapes.append((found["site"], found["columns"], len(found["scores"][0])))
            self.assertEqual(len(found["scores"]), LAYERS)
            for raw, share in zip(found["scores"], found["normalised"]):
                for x, y in zip(raw, share):
                    whole = value["clean"] - value["corrupted"]
                    self.assertAlmostEqual(y, (x - value["corrupted"]) / whole, 6)
        self.assertEqual(
            shapes, [("resid_post", "position", TOKENS), ("z", "head", HEADS), ("v", "head", 1)]
        )
        last = value["maps"][0]["normalised"][-1]
        self.assertAlmostEqual(last[-1], 1, 3)
        self.assertEqual([round(x, 3) for x in last[:-1]], [0] * (TOKENS - 1))

    def test_a_number_is_that_of_an_edit(self):
        value = self.patch("--sweep", "mlp_out", *self.RUN, "--batch", 3)
        edit = ("--edit", "blocks.1.mlp_out[pos=3]=other", "--token-ids", "5,6")
        ids = ("--ids", OTHER_IDS, "--other-ids", PROMPT_IDS)
        alone = one_object("patch", *model("ids"), *ids, *edit)
        self.assertAlmostEqual(value["maps"][0]["scores"][1][3], alone["after"]["score"], 4)
        self.assertAlmostEqual(value["corrupted"], alone["before"]["score"], 4)

    def test_text(self):
        run = ("patch", *model("text"), "-p", "abc", "--corrupted", "a", "--tokens", "a,abc")
        shown = gemma(*run, "--sweep", "resid_pre,q").stdout
        scores = r"clean -?\d+\.\d{3}, corrupted -?\d+\.\d{3}"
        self.assertRegex(shown, rf"^logit a \u2212 abc: {scores}\n")
        self.assertRegex(shown, r"\n +1\.000  layer  0, position 1 abc\|a\n")
        self.assertRegex(shown, r"\nq of the clean run .*\n +-?\d+\.\d{3}  layer +\d, head \d\n")

    def test_page(self):
        path = self.folder / "page.html"
        run = ("--sweep", "resid_post,pattern", "--html", path)
        self.patch(*run, *self.RUN)
        page = path.read_text(encoding="utf-8")
        found = Page(page)
        self.assertNotIn("script", found.tags)
        self.assertNotIn("link", found.tags)
        self.assertNotRegex(page, r"(?i)https?:|url\(|src=|href=|@import")
        self.assertIn("Activation patching", found.text)
        self.assertIn("resid_post", found.text)
        self.assertIn("271|9", found.text)
        svgs = re.findall(r"<svg.*?</svg>", page, re.S)
        self.assertEqual(len(svgs), 4)  # a map and its colours, twice
        for svg in svgs:
            xml.etree.ElementTree.fromstring(svg)
        cells = svgs[1].count("<path ")
        self.assertEqual(cells, LAYERS * TOKENS)
        self.assertEqual(svgs[3].count("<path "), LAYERS * HEADS)

    def test_a_page_shows_any_piece_as_text(self):
        path = self.folder / "page.html"
        run = ("patch", *model("text"), "--sweep", "z", "--html", path)
        gemma(*run, "-p", "a<b>\n&'\"", "--corrupted", "b<b>\n&'\"", "--tokens", "a,abc")
        page = path.read_text(encoding="utf-8")
        found = Page(page)
        self.assertNotIn("b", found.tags)
        self.assertIn("a<b>", found.text)
        self.assertIn("\u21b5&'\"", found.text)

    def test_a_long_prompt_s_page_is_small(self):
        path = self.folder / "page.html"
        clean = ["2"] + [str(12 + i % 250) for i in range(199)]
        corrupted = clean[:50] + ["5"] + clean[51:]
        sites = "resid_pre,resid_mid,resid_post,attn_out,mlp_out,z,q,k,v,pattern"
        ids = ("--ids", ",".join(clean), "--corrupted-ids", ",".join(corrupted))
        tokens = ("--token-ids", "5,6")
        gemma("patch", *model("ids"), "--sweep", sites, *ids, *tokens, "--html", path)
        page = path.read_text(encoding="utf-8")
        cells = re.findall(r"<path .*?</path>", page)
        self.assertEqual(len(cells), LAYERS * (5 * 200 + 3 * HEADS + 2))
        # The model that counts has 18 layers.
        more = (18 / LAYERS - 1) * sum(len(cell) for cell in cells)
        self.assertLess(path.stat().st_size + more, 2e6)

    def test_refusals(self):
        run = ("--sweep", "z", "--token-ids", "5,6")
        self.assertIn("--corrupted: expected a prompt, got none", self.wrong(*run))
        self.assertIn("--tokens", self.wrong("--sweep", "z", "--corrupted-ids", "2", code=2))
        short = self.wrong(*run, "--corrupted-ids", "2,5")
        self.assertIn("expected 7 tokens as the clean prompt has, got 2", short)
        same = self.wrong(*run, "--corrupted-ids", PROMPT_IDS)
        self.assertIn("expected a prompt that scores otherwise", same)
        self.assertIn("got 300", self.wrong(*run, "--corrupted-ids", "2,300"))
        page = self.folder / "page.html"
        for site, why in (
            ("resid", "sites: expected some of embed, resid_pre"),
            ("blocks.1.z", "got blocks.1.z"),
            ("z,logits", "expected those of layers, got logits"),
        ):
            more = ("--sweep", site, *self.RUN, "--html", page)
            self.assertIn(why, self.wrong(*more))
        self.assertIn("batch", self.wrong("--sweep", "z", *self.RUN, "--batch", 0))
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_ctrl_c_leaves_nothing(self):
        page = self.folder / "page.html"
        ids = ["2"] + ["12"] * 900
        clean, corrupted = ",".join(ids), ",".join(ids[:-1] + ["5"])
        command = [cli.GEMMA, "patch", *map(str, model("ids")), "--ids", clean]
        more = ["--corrupted-ids", corrupted, "--token-ids", "5", "--batch", "1", "--html", page]
        run = subprocess.Popen(
            [*command, *more, "--sweep", "resid_post,resid_pre,mlp_out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(2)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=300)
        self.assertRegex(
            err, r"^gemma: error: \[sweep\] stopped after \d+ of 5406 patched runs, nothing was wr"
        )
        self.assertEqual((run.returncode, out), (1, ""))
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    cli.main()
