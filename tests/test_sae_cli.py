#!/usr/bin/env python3
"""gemma sae from outside: features of a text, their page, reconstruction's loss, edited text.

    python3 tests/test_sae_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import math
import pathlib
import random
import re
import struct
import tempfile
import unittest
import zipfile

import test_cli as cli
from test_cli import GENERATE_FIELDS, PROMPT_IDS, error, gemma, model, one_object
from test_patch_cli import Page, tensor_file

WIDTH, FEATURES, TOKENS = 16, 24, 7
SITE = ("--site", "blocks.0.resid_post")
TRANSCODER = ("--input-site", "blocks.0.resid_post", "--output-site", "blocks.1.mlp_out")
GREEDY = ("-n", 6, "--greedy", "--seed", 1)


def random_sae(seed=5):
    """name -> (shape, numbers) of an autoencoder."""
    draw = random.Random(seed)
    shapes = {
        "W_enc": [WIDTH, FEATURES],
        "W_dec": [FEATURES, WIDTH],
        "b_enc": [FEATURES],
        "b_dec": [WIDTH],
    }
    tensors = {
        name: (shape, [draw.gauss(0, 0.3) for _ in range(math.prod(shape))])
        for name, shape in shapes.items()
    }
    return tensors | {"threshold": ([FEATURES], [draw.random() for _ in range(FEATURES)])}


def same_sae():
    """An autoencoder that gives back its input."""
    same = [float(i == j) for i in range(WIDTH) for j in range(WIDTH)]
    return zero_sae() | {"W_skip": ([WIDTH, WIDTH], same)}


def zero_sae():
    """An autoencoder that gives zeros."""
    zeros = {"W_dec": ([FEATURES, WIDTH], [0.0] * FEATURES * WIDTH)}
    return random_sae() | zeros | {"b_dec": ([WIDTH], [0.0] * WIDTH)}


def npz(path, tensors, compression=zipfile.ZIP_STORED):
    """A .npz file as np.savez writes it, by Python's own zipfile."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, (shape, values) in tensors.items():
            sizes = ", ".join(map(str, shape)) + ","
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}), }}\n".encode()
            data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(data + struct.pack(f"<{len(values)}f", *values))
    return path


class SaeTest(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.file = tensor_file(self.folder / "sae", **random_sae())

    def sae(self, what, *more, name="ids", site=SITE, ids=PROMPT_IDS):
        run = ("sae", what, *model(name), "--sae", self.file, *site)
        return one_object(*run, *(("--ids", ids) if ids else ()), *more)

    def wrong(self, what, *more, site=SITE, code=1):
        run = ("sae", what, *model("ids"), "--sae", self.file, *site, "--ids", PROMPT_IDS)
        return error(*run, *more, code=code)


class Encode(SaeTest):
    def test_json(self):
        every = ",".join(map(str, range(FEATURES)))
        value = self.sae("encode", "--top", FEATURES, "--feature", every)
        self.fields(value, "sae input output ids pieces l0 explained top features")
        self.assertEqual((value["input"], value["output"]), (SITE[1], SITE[1]))
        self.assertEqual((len(value["top"]), len(value["features"])), (TOKENS, FEATURES))
        active = 0
        for token, top in enumerate(value["top"]):
            values = [row["activation"] for row in top]
            self.assertEqual(values, sorted(values, reverse=True))
            column = {f["feature"]: f["activations"][token] for f in value["features"]}
            found = {row["feature"]: row["activation"] for row in top}
            self.assertEqual(set(found), {f for f, x in column.items() if x > 0})
            for feature, activation in found.items():
                self.assertAlmostEqual(activation, column[feature], 5)
            active += len(top)
        self.assertGreater(active, 0)
        self.assertAlmostEqual(value["l0"], active / TOKENS)

    def test_features_are_of_the_site_s_value(self):
        """Recomputed from what `capture` saves."""
        value = self.sae("encode", "--feature", 3)["features"][0]["activations"]
        out = self.folder / "x"
        gemma("capture", *model("ids"), "--ids", PROMPT_IDS, "--sites", SITE[1], "-o", out)
        data = out.read_bytes()[-4 * TOKENS * WIDTH :]
        x = struct.unpack(f"<{TOKENS * WIDTH}f", data)
        sae = random_sae()
        for token in range(TOKENS):
            p = sae["b_enc"][1][3]
            for i in range(WIDTH):
                p += x[token * WIDTH + i] * sae["W_enc"][1][i * FEATURES + 3]
            want = p if p > sae["threshold"][1][3] and p > 0 else 0
            self.assertAlmostEqual(value[token], want, 4)

    def test_npz_is_the_same(self):
        want = self.sae("encode", "--feature", 3)
        self.file = npz(self.folder / "sae.npz", random_sae())
        value = self.sae("encode", "--feature", 3)
        self.assertEqual(value["features"], want["features"])
        self.file = npz(self.folder / "packed.npz", random_sae(), zipfile.ZIP_DEFLATED)
        self.assertIn("np.savez instead of np.savez_compressed", self.wrong("encode"))

    def test_a_transcoder_explains_its_output(self):
        self.file = tensor_file(self.folder / "same", **same_sae())
        self.assertAlmostEqual(self.sae("encode")["explained"], 1, 5)
        self.assertLess(self.sae("encode", site=TRANSCODER)["explained"], 0.9)

    def test_page(self):
        page = self.folder / "page.html"
        run = ("-p", "abc a<b>", "--feature", "3,5,20", "--html", page)
        value = self.sae("encode", *run, name="text", ids=None)
        text = page.read_text(encoding="utf-8")
        found = Page(text)
        for word in ("script", "link", "img", "b"):
            self.assertNotIn(word, found.tags)
        self.assertNotRegex(text, r"(?i)(src|href)=|url\(|@import|https?:")
        self.assertEqual(found.text.count("abc a<b>"), 3)
        self.assertIn("Feature 20", found.text)
        colours = re.findall(r'<span[^>]* style="background:(#\w+)"', text)
        for row in value["features"]:
            n, active = len(row["activations"]), sum(x > 0 for x in row["activations"])
            self.assertIn(f"active at {active} of {n} tokens", found.text)
            grey = [colour == "#b0b0b0" for colour in colours[:n]]
            self.assertEqual(grey, [True] + [False] * (n - 1))  # BOS is off the scale
            del colours[:n]
        self.assertNotIn('title="nan"', text)  # a grey token has its number too
        self.assertIn("--html", self.wrong("encode", "--html", page, code=2))

    def test_text(self):
        run = ("sae", "encode", *model("ids"), "--sae", self.file, *SITE, "--ids", PROMPT_IDS)
        shown = gemma(*run).stdout.splitlines()
        value = self.sae("encode")
        want = f"{value['l0']:.1f} features a token, {100 * value['explained']:.1f} % explained"
        self.assertEqual(shown[0], f"blocks.0.resid_post: {want}")
        self.assertEqual(len(shown), 1 + TOKENS)

    def test_refusals(self):
        self.assertIn("--site", self.wrong("encode", site=(), code=2))
        self.assertIn("--site", self.wrong("encode", "--input-site", "embed", code=2))
        self.assertIn("--site", self.wrong("encode", site=("--input-site", "embed"), code=2))
        self.assertIn("matches 2", self.wrong("encode", site=("--site", "blocks.*.resid_post")))
        self.assertIn("its width is 32", self.wrong("encode", site=("--site", "blocks.0.gate")))
        self.assertIn("expected 0 to 23, got 24", self.wrong("encode", "--feature", 24))
        self.assertIn("top", self.wrong("encode", "--top", 0))
        self.assertIn("got fused", self.wrong("encode", "--engine", "fused"))
        self.file = "/nowhere"
        self.assertIn("/nowhere", self.wrong("encode"))
        self.file = tensor_file(self.folder / "x", **random_sae(), scale=([1], [1]))
        self.assertIn("got scale", self.wrong("encode"))


class Reconstruct(SaeTest):
    def test_losses(self):
        value = self.sae("reconstruct")
        self.fields(
            value,
            "sae input output tokens nll nll_reconstructed nll_zeroed increase recovered",
        )
        run = ("perplexity", *model("ids"), "--ids", PROMPT_IDS, "-c", 0, "--engine", "eager")
        self.assertAlmostEqual(value["nll"], one_object(*run)["nll"], 6)
        self.assertEqual(value["increase"], value["nll_reconstructed"] - value["nll"])
        share = (value["nll_zeroed"] - value["nll_reconstructed"]) / (
            value["nll_zeroed"] - value["nll"]
        )
        self.assertAlmostEqual(value["recovered"], share)
        self.assertNotEqual(value["nll_zeroed"], value["nll_reconstructed"])
        run = ("sae", "reconstruct", *model("ids"), "--sae", self.file, *SITE, "--ids", PROMPT_IDS)
        shown = gemma(*run).stdout
        self.assertIn(f": loss {value['nll']:.4f} as it is, ", shown)
        self.assertIn(f" ({value['increase']:+.4f}), {value['nll_zeroed']:.4f} with zeros", shown)
        self.assertIn(f"; {100 * value['recovered']:.1f} % recovered\n", shown)

    def test_chunks_are_those_of_perplexity(self):
        run = ("perplexity", *model("ids"), "--ids", PROMPT_IDS, "-c", 4, "--engine", "eager")
        value = self.sae("reconstruct", "-c", 4)
        self.assertAlmostEqual(value["nll"], one_object(*run)["nll"], 6)
        self.assertNotAlmostEqual(value["nll"], self.sae("reconstruct")["nll"], 3)

    def test_zeros_stand_at_the_output(self):
        self.file = tensor_file(self.folder / "zero", **zero_sae())
        value = self.sae("reconstruct", site=TRANSCODER)
        self.assertAlmostEqual(value["nll_zeroed"], value["nll_reconstructed"], 6)
        self.assertNotAlmostEqual(value["nll_zeroed"], value["nll"], 3)

    def test_one_that_gives_back_its_input_costs_nothing(self):
        self.file = tensor_file(self.folder / "same", **same_sae())
        value = self.sae("reconstruct")
        self.assertAlmostEqual(value["increase"], 0, 5)
        self.assertAlmostEqual(value["recovered"], 1, 5)

    def test_a_transcoder(self):
        site = ("--input-site", "blocks.1.mlp_in", "--output-site", "blocks.1.mlp_out")
        value = self.sae("reconstruct", site=site)
        self.assertEqual((value["input"], value["output"]), (site[1], site[3]))
        self.assertNotEqual(value["increase"], 0)
        back = ("--input-site", "blocks.1.mlp_out", "--output-site", "blocks.1.mlp_in")
        self.assertIn("or a later site", self.wrong("reconstruct", site=back))


class Generate(SaeTest):
    def test_json(self):
        value = self.sae("generate", *GREEDY, "--ablate", "3,5", "--clamp", "7=10,8=-2.5")
        self.fields(value, GENERATE_FIELDS + " sae input output reconstruct activations")
        found = {row["feature"]: row["activation"] for row in value["activations"]}
        self.assertEqual(found, {3: 0, 5: 0, 7: 10, 8: -2.5})
        self.assertEqual((value["engine"], value["reconstruct"]), ("eager", False))

    def test_edits_change_the_text(self):
        plain = one_object("generate", *model("ids"), "--ids", PROMPT_IDS, *GREEDY)["ids"]
        self.assertNotEqual(self.sae("generate", *GREEDY, "--clamp", "7=500")["ids"], plain)
        self.assertNotEqual(self.sae("generate", *GREEDY, "--reconstruct")["ids"], plain)
        tensors = random_sae() | {"threshold": ([FEATURES], [1e9] * FEATURES)}
        self.file = tensor_file(self.folder / "silent", **tensors)
        self.assertEqual(self.sae("generate", *GREEDY, "--ablate", "7")["ids"], plain)

    def test_refusals(self):
        self.assertIn("--ablate, --clamp or --reconstruct", self.wrong("generate", code=2))
        self.assertIn("got 24", self.wrong("generate", "--ablate", 24))
        for text in ("5", "5=", "=1", "x=1", "5=x"):
            self.assertIn(f'"{text}"', self.wrong("generate", "--clamp", text))
        self.assertIn("got two", self.wrong("generate", "--clamp", "5=1", "--ablate", 5))
        self.assertIn("got fused", self.wrong("generate", "--ablate", 5, "--engine", "fused"))


if __name__ == "__main__":
    cli.main()
