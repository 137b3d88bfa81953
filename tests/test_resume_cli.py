#!/usr/bin/env python3
"""Work that was stopped or killed goes on: the same command makes the same bytes.

    python3 tests/test_resume_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import pathlib
import signal
import struct
import subprocess
import tempfile
import unittest

import test_cli as cli
from test_cli import PROMPT_IDS, error, model, one_object


class ResumeTest(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.out = self.folder / "out"
        self.part = self.folder / "out.part"
        self.journal = self.folder / "out.part.jsonl"

    def only(self, *files):
        self.assertEqual(sorted(self.folder.iterdir()), sorted(files))

    def cut(self, how, command, journal, lines):
        """Sends a signal once `journal` has so many lines; what the command said."""
        run = subprocess.Popen(
            [cli.GEMMA, *map(str, command)], stderr=subprocess.PIPE, text=True
        )
        cli.wait_for_lines(journal, lines, run)
        run.send_signal(how)
        shown = run.communicate(timeout=300)[1]
        self.assertNotEqual(run.returncode, 0)
        return shown

    def refused(self, command, why):
        shown = error(*command)
        self.assertRegex(shown, r"^gemma: error: \[results\] \S+: ")
        self.assertIn(why, shown)


class Sweeps(ResumeTest):
    OTHER_IDS = "2,269,270,9,272,10,11"
    RUN = ("patch", *("--ids", PROMPT_IDS, "--corrupted-ids", OTHER_IDS))
    SITES = ("--sweep", "resid_post,z", "--token-ids", "5,6")

    def run_out(self, *more):
        return one_object(*self.RUN, *model("ids"), *more, "-o", self.out)

    def test_a_cut_sweep_goes_on(self):
        page = self.folder / "page.html"
        run = (*self.SITES, "--batch", 4, "--html", page)
        whole = one_object(*self.RUN, *model("ids"), *run)
        whole_page = page.read_bytes()
        self.assertEqual(self.run_out(*run), whole)
        content = self.out.read_bytes()
        lines = content.splitlines(keepends=True)
        self.assertEqual(len(lines), 1 + 5)  # passes of 4, 18 runs
        # nothing, half the header, the header, some passes, half a pass, all
        for kept in (b"", lines[0][:20], lines[0], b"".join(lines[:4]), content[:-9], content):
            page.unlink()
            self.out.write_bytes(kept)
            self.assertEqual(self.run_out(*run), whole)
            self.assertEqual(page.read_bytes(), whole_page)
            self.assertEqual(self.out.read_bytes(), content)
        # What is in the file is not run again.
        row = json.loads(lines[1])
        row["scores"][0] += 1000
        self.out.write_bytes(lines[0] + json.dumps(row).encode() + b"\n")
        scores = [value["maps"][0]["scores"][0] for value in (self.run_out(*run), whole)]
        self.assertAlmostEqual(scores[0][0], scores[1][0] + 1000, 2)
        self.assertEqual(scores[0][1:], scores[1][1:])

    def test_another_sweep_s_file_is_refused(self):
        self.run_out(*self.SITES)
        content = self.out.read_bytes()
        other = ("--sweep", "z", "--token-ids", "5,6")
        short = ("--sweep", "resid_post,z", "--token-ids", "5")
        swapped = ("patch", "--ids", self.OTHER_IDS, "--corrupted-ids", PROMPT_IDS)
        for run, more, why in (
            (self.RUN, other, 'sites: expected ["z"], the file has ["resid_post","z"]'),
            (self.RUN, short, "tokens: expected [5], the file has [5,6]"),
            (self.RUN, (*self.SITES, "--batch", 3), "batch: expected 3, the file has 16"),
            (self.RUN, (*self.SITES, "--dtype", "bfloat16"), "dtype: expected"),
            (swapped, self.SITES, "clean: expected"),
        ):
            self.refused((*run, *model("ids"), *more, "-o", self.out), why)
            self.assertEqual(self.out.read_bytes(), content)
        edit = ("patch", *model("ids"), "--ids", "2,5", "--edit", "embed=zero", "-o", self.out)
        self.assertIn("--out", error(*edit, code=2))

    def test_a_refused_sweep_leaves_no_file_that_would_refuse_its_correction(self):
        refused = error(
            *self.RUN, *model("ids"), "--sweep", "logits", "--token-ids", "5", "-o", self.out
        )
        self.assertIn("expected those of layers, got logits", refused)
        self.only()

    def test_ctrl_c_keeps_the_passes_done(self):
        ids = ["2"] + ["12"] * 900
        prompts = ("--ids", ",".join(ids), "--corrupted-ids", ",".join([*ids[:-1], "5"]))
        run = ("patch", *model("ids"), *prompts, "--token-ids", "5", "--batch", 1)
        command = (*run, "--sweep", "resid_post,resid_pre", "-o", self.out)
        shown = self.cut(signal.SIGINT, command, self.out, 3)
        stopped = r"^gemma: error: \[sweep\] stopped after (\d+) of 3604 patched runs, their sco"
        self.assertRegex(shown, stopped)
        done = int(shown.split("stopped after ")[1].split()[0])
        self.assertEqual(self.out.read_bytes().count(b"\n"), 1 + done)


class Distributions(ResumeTest):
    IDS = ",".join(str(2 + i * 7 % 290) for i in range(16 * 500))
    ROW = 2 * 300  # bytes of a position

    def command(self, *more, ids=IDS):
        return "kl", "save", *model("ids"), "--ids", ids, "-o", self.out, "--resume", *more

    def test_a_killed_run_goes_on(self):
        command = self.command("-c", 16)
        whole = one_object(*command)
        content = self.out.read_bytes()
        self.only(self.out)
        self.out.unlink()
        self.cut(signal.SIGKILL, command, self.journal, 300)
        self.only(self.part, self.journal)
        part, journal = self.part.read_bytes(), self.journal.read_bytes()
        rows = journal.splitlines(keepends=True)
        for name, of_part, of_journal in (
            ("as it was left", part, journal),
            ("half a row and half a line", part[: 3 - self.ROW], b"".join(rows[:-2]) + rows[-2][:9]),
            ("rows without a note", part + b"x" * 5000, b"".join(rows[:-3])),
            ("no note at all", part, b""),
            ("no part", None, journal),
        ):
            self.out.unlink(missing_ok=True)
            self.journal.write_bytes(of_journal)
            if of_part is not None:
                self.part.write_bytes(of_part)
            with self.subTest(name):
                self.assertEqual(one_object(*command), whole)
                self.assertEqual(self.out.read_bytes(), content)
                self.only(self.out)
        self.journal.write_bytes(journal)
        self.part.write_bytes(part[:100])
        shown = error(*command)
        self.assertRegex(shown, r"part: expected the first \d+ bytes of an earlier run, got \d+\.")

    def test_ctrl_c_keeps_what_is_done(self):
        shown = self.cut(signal.SIGINT, self.command("-c", 16), self.journal, 300)
        self.assertRegex(shown, r"^gemma: error: \[kl\] interrupted\. Hint: the same command goes")
        self.only(self.part, self.journal)
        journal = self.journal.read_bytes()
        for command, why in (
            (self.command("-c", 8), "chunk: expected 8, the file has 16"),
            (self.command("-c", 16, ids=self.IDS + ",2"), "tokens: expected"),
            (self.command("-c", 16, "--dtype", "bfloat16"), "dtype: expected"),
            (self.command("-c", 16, "--kv", "float32"), 'kv: expected "float32", the file'),
        ):
            self.refused(command, why)
            self.assertEqual(self.journal.read_bytes(), journal)
        # What is in the file is not computed again.
        data = bytearray(self.part.read_bytes())
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        first = begin + json.loads(data[8:begin])["codes"]["data_offsets"][0]
        data[first] ^= 1
        self.part.write_bytes(data)
        one_object(*self.command("-c", 16))
        self.assertEqual(self.out.read_bytes()[: first + self.ROW], data[: first + self.ROW])

    def test_nothing_done_leaves_nothing(self):
        self.assertIn("got 300", error(*self.command("-c", 0, ids="2,300")))
        self.only()


class Captures(ResumeTest):
    def setUp(self):
        super().setUp()
        self.lines = self.folder / "lines"
        self.lines.write_text("".join(f"[2, {5 + n % 90}]\n" for n in range(900)))

    def command(self, *more):
        sites = ("--prompts-jsonl", self.lines, "--sites", "embed,logits")
        return "capture", *model("ids"), *sites, "-o", self.out, "--resume", *more

    def test_a_killed_run_goes_on(self):
        whole = one_object(*self.command())
        content = self.out.read_bytes()
        for junk in (b"", b"xyz"):
            self.out.unlink()
            self.cut(signal.SIGKILL, self.command(), self.journal, 500)
            self.only(self.lines, self.part, self.journal)
            self.part.write_bytes(self.part.read_bytes() + junk)
            self.journal.write_bytes(self.journal.read_bytes() + junk)
            self.assertEqual(one_object(*self.command()), whole)
            self.assertEqual(self.out.read_bytes(), content)
            self.only(self.lines, self.out)

    def test_ctrl_c_keeps_finished_prompts(self):
        whole = one_object(*self.command())
        content = self.out.read_bytes()
        self.out.unlink()
        shown = self.cut(signal.SIGINT, self.command(), self.journal, 500)
        self.assertRegex(shown, r"after \d+ of 1800 tensors, finished prompts are kept\n$")
        dtype = 'save_dtype: expected "bfloat16", the file has "auto"'
        self.refused(self.command("--save-dtype", "bfloat16"), dtype)
        self.refused(self.command("--sites", "final_norm"), "sites: expected")
        lines = self.lines.read_text()
        self.lines.write_text(lines + "[2]\n")
        self.refused(self.command(), "prompts: expected 901, the file has 900")
        self.lines.write_text(lines.replace("[2, 5]", "[2, 6]", 1))
        self.refused(self.command(), "tokens: expected")
        self.lines.write_text(lines)
        # What is in the file is not computed again.
        data = bytearray(self.part.read_bytes())
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        first = begin + json.loads(data[8:begin])["prompt.0.embed"]["data_offsets"][0]
        data[first] ^= 1
        self.part.write_bytes(data)
        self.assertEqual(one_object(*self.command()), whole)
        other = self.out.read_bytes()
        self.assertEqual(other[:first] + content[first : first + 1] + other[first + 1 :], content)
        self.assertEqual(other[first], data[first])

    def test_nothing_done_leaves_nothing(self):
        self.lines.write_text("[2, 300]\n")
        self.assertIn("got 300", error(*self.command()))
        self.only(self.lines)


if __name__ == "__main__":
    cli.main()
