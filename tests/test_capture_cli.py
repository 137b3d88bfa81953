#!/usr/bin/env python3
"""gemma capture from outside: files that Python reads, prompts from files, errors.

    python3 tests/test_capture_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import pathlib
import resource
import signal
import struct
import subprocess
import tempfile
import time
import unittest

import test_cli as cli
from test_cli import ABC, BOS, PROMPT_IDS, error, gemma, model, one_object

LAYERS = 2
IN_LAYERS, WHOLE = 20, 3  # sites


def tensors(path):
    """(name -> (dtype, shape), metadata) of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert max(x["data_offsets"][1] for x in header.values()) == len(data) - 8 - length
    return {name: (x["dtype"], x["shape"]) for name, x in header.items()}, metadata


def ids(path, key="ids"):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[key]["data_offsets"]
    return list(struct.unpack(f"<{(end - begin) // 8}q", data[8 + length + begin :][: end - begin]))


class Capture(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.out = self.folder / "out.safetensors"

    def capture(self, *more, name="ids"):
        return one_object("capture", *model(name), "-o", self.out, *more)

    def wrong(self, *more, name="ids", code=1):
        return error("capture", *model(name), "-o", self.out, *more, code=code)

    def file(self, text):
        path = self.folder / "prompts"
        path.write_text(text, encoding="utf-8")
        return path

    def test_one_prompt(self):
        sites = ("--sites", "blocks.*.resid_post,embed", "--sites", "blocks.1.pattern")
        value = self.capture("--ids", PROMPT_IDS, *sites)
        self.fields(value, "out prompts tokens tensors bytes dtype save_dtype")
        self.assertEqual((value["prompts"], value["tokens"], value["tensors"]), (1, 7, LAYERS + 2))
        self.assertEqual(value["bytes"], self.out.stat().st_size)
        found, metadata = tensors(self.out)
        self.assertEqual(
            found,
            {
                "ids": ("I64", [1, 7]),
                "embed": ("F32", [1, 7, 16]),
                "blocks.0.resid_post": ("F32", [1, 7, 16]),
                "blocks.1.resid_post": ("F32", [1, 7, 16]),
                "blocks.1.pattern": ("F32", [1, 2, 7, 7]),
            },
        )
        self.assertEqual(metadata["axes.pattern"], "B H T S")
        self.assertEqual(metadata["dtype"], "float32")
        self.assertEqual(metadata["model"], str(cli.MODELS / "ids"))
        self.assertEqual(ids(self.out), [int(i) for i in PROMPT_IDS.split(",")])

    def test_text_and_report(self):
        done = gemma("capture", *model("text"), "-p", "abc", "--sites", "logits", "-o", self.out)
        self.assertRegex(done.stdout, r"^\S+: 1 tensors of 1 prompt, 2 tokens, 0\.0 MB\n$")
        self.assertEqual(ids(self.out), [BOS, ABC])
        self.assertEqual(tensors(self.out)[0]["logits"], ("F32", [1, 2, 300]))

    def test_dtypes(self):
        run = ("--ids", "2,5", "--sites", "embed")
        for dtype, save, stored in (
            ("auto", "bfloat16", "BF16"),
            ("bfloat16", "auto", "BF16"),
            ("bfloat16", "float32", "F32"),
        ):
            value = self.capture(*run, "--dtype", dtype, "--save-dtype", save)
            self.assertEqual(tensors(self.out)[0]["embed"][0], stored)
            self.assertEqual(value["dtype"], tensors(self.out)[1]["dtype"])
            self.assertEqual(value["save_dtype"], tensors(self.out)[1]["save_dtype"])
        self.assertIn("float16", self.wrong(*run, "--save-dtype", "float16"))

    def test_many_prompts(self):
        lines = self.file("abc\r\na\n")
        value = self.capture("--prompts", lines, "--sites", "embed", name="text")
        self.assertEqual((value["prompts"], value["tokens"], value["tensors"]), (2, 4, 2))
        self.assertEqual(ids(self.out, "prompt.0.ids"), [BOS, ABC])
        self.assertEqual(tensors(self.out)[0]["prompt.1.embed"], ("F32", [1, 2, 16]))
        records = ['"abc"', "[2, 5, 6]", '{"prompt": "abc", "label": 1}', '{"ids": [9]}']
        lines = self.file("\n".join(records))
        self.capture("--prompts-jsonl", lines, "--sites", "embed", name="text")
        found = [ids(self.out, f"prompt.{n}.ids") for n in range(4)]
        self.assertEqual(found, [[BOS, ABC], [2, 5, 6], [BOS, ABC], [9]])
        lines = self.file("[2]\n")
        self.capture("--prompts-jsonl", lines, "--sites", "embed")  # no tokenizer needed
        self.assertEqual(ids(self.out, "prompt.0.ids"), [2])

    def test_bad_prompts(self):
        self.out.write_bytes(b"kept")
        for flag, text, why in (
            ("--prompts", "abc\n\na\n", "line 2: expected a prompt, got an empty line"),
            ("--prompts", "", "got an empty file"),
            ("--prompts-jsonl", "[2]\n[2, true]", "line 2: expected a list of token ids"),
            ("--prompts-jsonl", "{}", "line 1: expected a string, a list of ids"),
            ("--prompts-jsonl", '{"ids": [1], "prompt": "a"}', "line 1: expected a string"),
            ("--prompts-jsonl", "5", "got 5"),
            ("--prompts-jsonl", "{", "[json]"),
            ("--prompts-jsonl", "[300]", "prompt 0: expected ids from 0 to 299, got 300"),
        ):
            self.assertIn(why, self.wrong(flag, self.file(text), "--sites", "embed", name="text"))
        both = self.wrong("--prompts", self.file("a"), "-p", "a", "--sites", "embed", name="text")
        self.assertIn("expected one of -p, -f, --ids, --prompts and --prompts-jsonl, got 2", both)
        no_tokenizer = self.wrong("--prompts", self.file("a"), "--sites", "embed")
        self.assertIn('{"ids": [2, 818]}', no_tokenizer)
        self.assertIn("/nowhere", self.wrong("--prompts", "/nowhere", "--sites", "embed"))
        self.assertEqual(self.out.read_bytes(), b"kept")

    def test_refusals(self):
        run = ("--ids", "2,5", "--sites")
        self.assertIn("--sites", error("capture", "-o", self.out, code=2))
        self.assertIn("--out", error("capture", "--sites", "embed", code=2))
        for engine in ("fused", "traced"):
            refused = self.wrong(*run, "embed", "--engine", engine)
            self.assertIn(f"auto or eager, whose modules alone have sites, got {engine}", refused)
        refused = self.wrong(*run, "embed,blocks.*.resid_pots")
        self.assertIn('got "blocks.*.resid_pots". Hint: embed, final_norm, logits', refused)
        refused = error("capture", *model("ids"), *run, "embed", "-o", "/nowhere/x")
        self.assertIn("[write] /nowhere/x", refused)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_full_disk_leaves_nothing(self):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

        command = [cli.GEMMA, "capture", *map(str, model("ids")), "--ids", PROMPT_IDS]
        done = subprocess.run(
            [*command, "--sites", "*", "-o", self.out],
            capture_output=True,
            text=True,
            restore_signals=False,
            preexec_fn=limit,
            timeout=300,
        )
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^gemma: error: \[write\] \S+: File too large\n$")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_ctrl_c_leaves_nothing(self):
        lines = self.folder / "lines"
        lines.write_text("[2, 5]\n" * 20_000)
        command = [cli.GEMMA, "capture", *map(str, model("ids")), "--prompts-jsonl", lines]
        out = self.folder / "files" / "out"
        out.parent.mkdir()
        run = subprocess.Popen(
            [*command, "--sites", "embed", "-o", out], stderr=subprocess.PIPE, text=True
        )
        while not list(out.parent.iterdir()) and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        self.assertRegex(
            run.communicate(timeout=300)[1],
            r"^gemma: error: \[capture\] stopped after \d+ of 20000 tensors, no file was wr",
        )
        self.assertEqual(run.returncode, 1)
        self.assertEqual(list(out.parent.iterdir()), [])

    def test_parity_reads_a_capture(self):
        value = self.capture("--ids", PROMPT_IDS, "--sites", "*")
        self.assertEqual(value["tensors"], LAYERS * IN_LAYERS + WHOLE)
        parity = one_object("parity", self.out, *model("ids"))
        self.assertEqual(len(parity["sites"]), value["tensors"])
        self.assertEqual(max(row["max_abs"] for row in parity["sites"]), 0)
        self.assertEqual(parity["reference"], "gemma_torch")

    def test_the_table_of_sites(self):
        sites = one_object("capture", "--list-sites")["sites"]
        self.assertEqual(len(sites), IN_LAYERS + WHOLE)
        for row in sites:
            self.fields(row, "site axes module tensor transformer_lens difference")
        by_name = {row["site"]: row for row in sites}
        self.assertEqual(by_name["blocks.N.pattern"]["axes"], "B H T S")
        self.assertEqual(by_name["blocks.N.z"]["module"], "model.layers.N.self_attn.o_proj")
        self.assertEqual(by_name["embed"]["transformer_lens"], "hook_embed")
        self.assertIsNone(by_name["blocks.N.mlp_proj"]["transformer_lens"])
        shown = gemma("capture", "--list-sites").stdout
        for row in sites:
            site = row["site"].split(".")[-1]
            self.assertRegex(shown, rf"(?m)^{site} +{row['axes']} +{row['module']} ")


if __name__ == "__main__":
    cli.main()
