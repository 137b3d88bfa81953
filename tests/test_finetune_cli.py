#!/usr/bin/env python3
"""gemma finetune from outside: what it learns, what it leaves, how it goes on, what it refuses.

    python3 tests/test_finetune_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import unittest
import unittest.mock

import test_cli as cli
from test_cli import PROMPT_IDS, error, gemma, model, one_object

# Twelve examples in which 7 follows 5 and 6; threads are one, for equal bits.
LINES = [{"prompt_ids": [2, 5 + i % 3, 5, 6], "completion_ids": [7, 8 + i % 2]} for i in range(12)]
SAME = ("--seed", 3, "-t", 1, "--learning-rate", 0.02, "--lora-rank", 4, "--batch-size", 2)


class FinetuneTest(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.data = self.lines("data.jsonl", LINES)

    def lines(self, name, rows):
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def command(self, out, *more):
        run = ("finetune", "--data", self.data, "--out", self.folder / out)
        return (*run, *model("ids"), *SAME, *more)

    def train(self, out, *more):
        return one_object(*self.command(out, *more))

    def log(self, out):
        text = (self.folder / out / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def matrices(self, out):
        return (self.folder / out / "adapter" / "adapter_model.safetensors").read_bytes()


class Trains(FinetuneTest):
    def test_an_adapter_that_learns(self):
        found = self.train("run", "--epochs", 8, "--eval-data", self.data, "--eval-every", 6)
        self.assertEqual(found["steps"], 48)
        self.assertEqual(found["tokens"], 8 * 12 * 6)
        steps = [row for row in self.log("run") if "loss" in row]
        self.assertEqual([row["step"] for row in steps], list(range(1, 49)))
        self.assertEqual([row["epoch"] for row in steps[4:8]], [0, 0, 1, 1])
        rates = [row["learning_rate"] for row in steps]
        self.assertAlmostEqual(rates[24], 0.01)  # linear, half way
        losses = [row["eval_loss"] for row in self.log("run") if "eval_loss" in row]
        self.assertEqual(len(losses), 9)
        self.assertLess(found["best_eval_loss"], losses[0] - 1)
        self.assertEqual(found["best_eval_loss"], min(losses))
        run = ("generate", "--ids", "2,5,5,6", "-n", 1, "--greedy", *model("ids"))
        learnt = one_object(*run, "--lora", found["out"])
        self.assertEqual(learnt["ids"], [7])
        self.assertNotEqual(one_object(*run)["ids"], [7])

    def test_the_best_step_is_kept(self):
        other = [{"prompt_ids": [2, 9, 4, 12, 40], "completion_ids": [7]}] * 3
        held = self.lines("held.jsonl", [{**row, "completion_ids": [30 + i]} for i, row in enumerate(other)])
        more = ("--eval-data", held, "--eval-every", 2, "--patience", 2, "--epochs", 40)
        found = self.train("run", *more)
        losses = [row["eval_loss"] for row in self.log("run") if "eval_loss" in row]
        best = losses.index(min(losses))
        self.assertTrue(found["stopped_early"])
        self.assertEqual(found["best_step"], 2 * best)
        self.assertEqual(len(losses), best + 3)  # two more that are no better
        self.assertLess(losses[best], losses[-1])
        # The adapter is that of the best step.
        run = ("eval", "--data", held, *model("ids"), "--engine", "eager", "--lora", found["out"])
        self.assertAlmostEqual(one_object(*run)["nll"], min(losses), places=4)

    def test_weights(self):
        found = self.train("run", "--train", "*.mlp.*,model.norm.weight", "--epochs", 4)
        self.assertTrue(found["out"].endswith("/run/model"))
        run = ("perplexity", "--ids", "2,5,5,6,7,8", "-c", 0)
        after = one_object(*run, "-m", found["out"])["nll"]
        self.assertLess(after, one_object(*run, *model("ids"))["nll"])
        steps = [row["loss"] for row in self.log("run") if "loss" in row]
        self.assertLess(steps[-1], steps[0])

    def test_answers_are_kept(self):
        out = self.folder / "answers.jsonl"
        run = ("eval", "--data", self.data, *model("ids"), "--answers")
        self.assertIn("--out", gemma(*run, code=2).stderr)
        found = one_object(*run, "-n", 2, "-o", out)
        rows = [json.loads(line) for line in out.read_text().splitlines()][1:]
        self.assertEqual([row["line"] for row in rows], list(range(1, 13)))
        self.assertEqual([row["expected"] for row in rows], [x["completion_ids"] for x in LINES])
        exact = [row["answer"] == row["expected"] for row in rows]
        self.assertEqual([row["exact"] for row in rows], exact)
        self.assertAlmostEqual(found["nll"], sum(row["nll"] for row in rows) / found["targets"])

    def test_text_report(self):
        shown = gemma(*self.command("run", "--max-steps", 2))
        self.assertRegex(shown.stdout, r"run/adapter: 2 steps, 24 tokens, \d+ tok/s, peak memory")
        self.assertIn("12 examples, 72 tokens, 24 of them targets; 0 cut to 512", shown.stderr)


class FromScratch(FinetuneTest):
    """A model of the tiny folder's shape, on a text of its vocabulary's letters."""

    def setUp(self):
        super().setUp()
        self.text = self.folder / "book.txt"
        self.text.write_text("abc ab\ncd é\n\n" * 120)
        self.config = self.folder / "small.json"
        config = json.loads((cli.MODELS / "text" / "config.json").read_text())
        self.config.write_text(json.dumps({**config, "dtype": "float32"}))

    def command(self, out, *more):
        new = ("--from-scratch", self.config, "--tokenizer", cli.MODELS / "text")
        run = ("finetune", *new, "--plain-text", "--data", self.text, "--out", self.folder / out)
        return (*run, "--max-tokens", 17, "--batch-size", 4, "--seed", 3, "-t", 1, *more)

    def windows(self, out):
        text = (self.folder / out / "data.jsonl").read_text()
        return [json.loads(line)["ids"] for line in text.splitlines()]

    def test_learns_a_text(self):
        found = self.train("run", "--eval-data", self.text, "--max-steps", 60, "--learning-rate", 0.01)
        windows = self.windows("run")
        self.assertEqual({ids[0] for ids in windows}, {2})
        self.assertEqual({len(ids) for ids in windows[:-1]}, {17})
        losses = [row["eval_loss"] for row in self.log("run") if "eval_loss" in row]
        self.assertAlmostEqual(losses[0], 5.7, delta=1.5)  # ln 300: a tied head draws small logits
        self.assertLess(found["best_eval_loss"], 1.0)
        written = one_object("generate", "-p", "abc ab\n", "-n", 6, "--greedy", "-m", found["out"])
        self.assertEqual(written["text"], "cd é\n\nabc ")
        # The first weights are kept, and are the seed's.
        first = one_object("perplexity", "--ids", "2,5,6,7", "-c", 0, "-m", self.folder / "run" / "initial")
        again = self.folder / "again"
        self.train("again", "--max-steps", 1)
        weights = [(self.folder / out / "initial" / "model.safetensors").read_bytes() for out in ("run", "again")]
        self.assertEqual(*weights)
        self.assertGreater(first["nll"], 4)
        self.assertTrue((again / "model" / "tokenizer.model").exists())

    def test_a_killed_run_ends_in_the_same_bits(self):
        more = ("--max-steps", 300, "--save-every", 20, "--sparse-embedding")
        self.train("whole", *more)
        words = [cli.GEMMA, *map(str, self.command("cut", *more))]
        run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        cli.wait_for_lines(self.folder / "cut" / "log.jsonl", 30, run)
        run.kill()
        run.communicate(timeout=300)
        self.assertIn("expected a new folder", error(*self.command("cut", *more)))
        seed = list(self.command("cut", *more, "--resume"))
        seed[seed.index("--seed") + 1] = 4
        for other in (seed, self.command("cut", *more, "--resume", "--dtype", "bfloat16")):
            shown = error(*other)
            self.assertIn("expected the weights that the run began with", shown)
        words = [word for word in self.command("cut", *more, "--resume") if word != "--tokenizer"]
        words.remove(cli.MODELS / "text")
        self.assertIn("expected the --tokenizer that the run began with", error(*words))
        self.train("cut", *more, "--resume")
        bits = [(self.folder / out / "model" / "model.safetensors").read_bytes() for out in ("cut", "whole")]
        self.assertEqual(*bits)

    def test_a_bfloat16_optimizer_goes_on_too(self):
        config = json.loads(self.config.read_text())
        self.config.write_text(json.dumps({**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
        narrow = ("--max-steps", 40, "--save-every", 1, "--optimizer-dtype", "bfloat16")
        self.train("whole", *narrow)
        self.assertLess(self.log("whole")[-1]["loss"], self.log("whole")[0]["loss"] - 1)
        at = self.folder / "whole" / "checkpoints"
        sizes = [(folder / "state.safetensors").stat().st_size for folder in at.iterdir()]
        weights = (self.folder / "whole" / "model" / "model.safetensors").stat().st_size
        self.assertLess(max(sizes), 3 * weights + 10_000)  # weights and two moments, of 2 bytes each
        run = subprocess.Popen([cli.GEMMA, *map(str, self.command("cut", *narrow))], stderr=subprocess.PIPE)
        cli.wait_for_lines(self.folder / "cut" / "log.jsonl", 8, run)
        run.kill()
        run.communicate(timeout=300)
        wide = error(*self.command("cut", *narrow[:-1], "float32", "--resume"))
        self.assertIn('optimizer_dtype: expected "bfloat16", as the run began with, got "float32"', wide)
        self.train("cut", *narrow, "--resume")
        bits = [(self.folder / out / "model" / "model.safetensors").read_bytes() for out in ("cut", "whole")]
        self.assertEqual(*bits)

    def test_rows_of_tokens_never_seen_stay(self):
        def embedding(folder):
            blob = (self.folder / folder / "model.safetensors").read_bytes()
            length = int.from_bytes(blob[:8], "little")
            at = json.loads(blob[8 : 8 + length])["model.embed_tokens.weight"]["data_offsets"]
            rows = blob[8 + length + at[0] : 8 + length + at[1]]
            return [rows[i : i + 64] for i in range(0, len(rows), 64)]  # 16 numbers of float32

        for flags, stays in ((("--sparse-embedding",), True), ((), False)):
            out = f"run{len(flags)}"
            found = gemma(*self.command(out, "--max-steps", 3, *flags))
            before, after = embedding(f"{out}/initial"), embedding(f"{out}/model")
            moved = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
            seen = {i for ids in self.windows(out) for i in ids}
            self.assertEqual(moved, seen if stays else set(range(300)))
            if stays:
                self.assertIn(f"{len(seen)} of the embedding's 300 rows are trained", found.stderr)

    def test_refuses(self):
        bad = self.folder / "bad.json"
        bad.write_text('{"hidden_size": 16}')
        small = self.folder / "few.json"
        small.write_text(json.dumps({**json.loads(self.config.read_text()), "vocab_size": 200}))
        for flags, want in {
            ("--from-scratch", "/nowhere.json"): "/nowhere.json: no such file",
            ("--from-scratch", bad): f"intermediate_size: expected a whole number, got nothing ({bad})",
            ("--from-scratch", small): "vocab_size: expected at least the 300 pieces",
            ("--tokenizer", "/nowhere"): "/nowhere: no such file or folder",
            ("--tokenizer", self.config): "tokenizer",
            ("--train", "*"): "expected no --model, --lora or --train beside it",
            ("--data", "/nowhere.txt"): "/nowhere.txt: expected a file, found none",
            ("--from", "x"): "--from continues an adapter",
        }.items():
            with self.subTest(flags=flags):
                words = list(self.command("run"))
                if flags[0] in words:
                    words[words.index(flags[0]) + 1] = flags[1]
                else:
                    words += flags
                self.assertIn(want, error(*words))
        self.train("run", "--max-steps", 1)  # where a wrong --data has left the first weights
        self.text.write_bytes(b"a\nb\n\xff")
        self.assertIn(f"{self.text}:3: expected UTF-8", error(*self.command("other")))
        run = ("finetune", "--data", self.data, "--out", self.folder / "third", *model("ids"))
        self.assertIn("expected --from-scratch", error(*run, "--tokenizer", "x"))
        self.assertIn("expected a model with a tokenizer", error(*run, "--plain-text"))
        self.assertIn("expected --full, --train or", error(*run, "--sparse-embedding"))
        narrow = ("--optimizer-dtype", "bfloat16")
        self.assertIn("an adapter's matrices are float32", error(*run, *narrow))
        self.assertIn("expected bfloat16, as the state is to be", error(*run, *narrow, "--full", "--dtype", "float32"))
        self.assertIn("float16", error(*run, "--full", "--optimizer-dtype", "float16"))
        frozen = error(*run, "--sparse-embedding", "--train", "*.mlp.*")
        self.assertIn("expected the embedding among what is trained", frozen)


class GoesOn(FinetuneTest):
    MORE = ("--epochs", 5, "--lora-dropout", 0.1, "--save-every", 4, "--accumulate", 2)

    def cut(self, how, out, lines):
        words = [cli.GEMMA, *map(str, self.command(out, *self.MORE))]
        run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        cli.wait_for_lines(self.folder / out / "log.jsonl", lines, run)
        run.send_signal(how)
        return run.communicate(timeout=300)[1], run.returncode

    def test_a_killed_run_ends_in_the_same_bits(self):
        self.train("whole", *self.MORE)
        self.cut(signal.SIGKILL, "cut", 6)
        self.train("cut", *self.MORE, "--resume")
        self.assertEqual(self.matrices("cut"), self.matrices("whole"))
        drop = ("seconds",)
        plain = [
            [{k: v for k, v in row.items() if k not in drop} for row in self.log(out)]
            for out in ("cut", "whole")
        ]
        self.assertEqual(*plain)

    def test_ctrl_c_keeps_a_checkpoint(self):
        shown, code = self.cut(signal.SIGINT, "cut", 2)
        self.assertEqual(code, 1)
        self.assertRegex(shown, r"\[finetune\] stopped after step \d+ of 15, which is kept in .*--resume")
        self.train("whole", *self.MORE)
        self.train("cut", *self.MORE, "--resume")
        self.assertEqual(self.matrices("cut"), self.matrices("whole"))

    def test_a_run_is_not_mixed_with_another(self):
        self.cut(signal.SIGKILL, "cut", 6)
        self.assertIn("--resume", error(*self.command("cut", *self.MORE)))
        other = error(*self.command("cut", *self.MORE, "--resume", "--warmup", 2))
        self.assertIn("warmup: expected 0, as the run began with, got 2", other)
        before = self.data.read_text()
        self.data.write_text(before.replace("[7, 8]", "[7, 9]", 1))  # as many lines, tokens and targets
        self.assertRegex(error(*self.command("cut", *self.MORE, "--resume")), r"cut: data: expected \"\w{16}\"")
        self.data.write_text(before)
        self.assertEqual(self.train("cut", *self.MORE, "--resume")["steps"], 15)
        self.assertIn("the run is finished", error(*self.command("cut", *self.MORE, "--resume")))


class Refuses(FinetuneTest):
    def test_flags(self):
        for flags, want in {
            ("--epochs", 0): "--epochs: expected at least 1, got 0",
            ("--max-steps", -1): "--max-steps: expected at least 1, got -1",
            ("--batch-size", 0): "--batch-size: expected at least 1, got 0",
            ("--accumulate", 0): "--accumulate: expected at least 1, got 0",
            ("--warmup", 99): "warmup: expected at most the 3 steps, got 99",
            ("--schedule", "square"): "--schedule: expected constant, linear or cosine, got square",
            ("--learning-rate", 0): "learning_rate: expected a number above 0, got 0",
            ("--max-grad-norm", -1): "max_grad_norm: expected a number of at least 0, got -1",
            ("--weight-decay", -1): "weight_decay: expected at least 0, got -1",
            ("--lora-rank", 0): "rank: expected at least 1, got 0",
            ("--lora-dropout", 1): "dropout: expected at least 0 and below 1, got 1",
            ("--target-modules", "lm_head"): "got lm_head",
            ("--train", "lm_head.weight"): 'got "lm_head.weight"',
            ("--full", "--train", "*"): "expected no --train beside it",
            ("--full", "--from", "x"): "--from continues an adapter",
            ("--patience", 2): "expected --eval-data with it",
            ("--max-tokens", 1): "max_tokens: expected at least 2, the first is not predicted, got 1",
            ("--engine", "fused"): "fused",
            ("--from", "/nowhere"): "/nowhere/adapter_config.json",
            ("--eval-data", "/nowhere"): "/nowhere",
        }.items():
            with self.subTest(flags=flags):
                run = ("finetune", "--data", self.data, "--out", self.folder / "run")
                shown = error(*run, *model("ids"), *flags)
                self.assertIn(want, shown)
                self.assertFalse((self.folder / "run" / "adapter").exists())

    def test_data_names_file_and_line(self):
        for line, want in {
            "{": ":3: ",
            '{"prompt_ids": [2]}': ":3: fields: ",
            '{"ids": [2, 99999]}': ":3: ids",
            '{"text": "a b"}': ":3: text: ",
            '{"ids": []}': ":3: ids: ",
        }.items():
            with self.subTest(line=line):
                good = [json.dumps(row) for row in LINES[:2]]
                self.data.write_text("\n".join([*good, line]) + "\n")
                shown = error(*self.command("run"))
                self.assertIn(f"{self.data}{want}", shown)

    def test_a_launcher_of_another_mpi(self):
        with unittest.mock.patch.dict(os.environ, PMI_SIZE="2"):
            shown = error(*self.command("run"))
        self.assertIn("[ranks] expected ", shown)
        self.assertFalse((self.folder / "run").exists())

    def test_missing(self):
        shown = gemma("finetune", *model("ids"), "--out", self.folder / "run", code=2)
        self.assertIn("--data", shown.stderr)


if __name__ == "__main__":
    cli.main()
