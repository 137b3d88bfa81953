#!/usr/bin/env python3
"""gemma finetune on several ranks: what they learn is what one learns, what stops one stops all.

    python3 tests/test_ranks_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]

Runs the mpirun that GEMMA_TORCH_MPIRUN names, or the one on PATH.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import unittest

import test_cli as cli
import test_finetune_cli as finetune
from test_cli import error, model

MPIRUN = os.environ.get("GEMMA_TORCH_MPIRUN", "mpirun")
# How Open MPI's mpirun is allowed what tests do; others read none of it.
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def matrices_of(path):
    """Name -> float32 values of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = memoryview(data[8 + length :][begin:end]).cast("f").tolist()
    return found


def distance(found, expected):
    """Norm of what differs, over the norm of what is expected."""
    off = sum((a - b) ** 2 for a, b in zip(found, expected, strict=True))
    return (off / max(sum(b * b for b in expected), 1e-60)) ** 0.5


class RanksTest(finetune.FinetuneTest):
    def start(self, ranks, out, *more):
        words = [MPIRUN, "-np", ranks, cli.GEMMA, *self.command(out, *more)]
        return subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ALLOWED, "OMP_NUM_THREADS": "1"},
        )

    def together(self, ranks, out, *more):
        run = self.start(ranks, out, *more, "--json")
        shown, wrong = run.communicate(timeout=200)
        self.assertEqual(run.returncode, 0, wrong)
        return json.loads(shown)

    def fails(self, run):
        """The errors told by a run that fails, and that it is over."""
        wrong = run.communicate(timeout=100)[1]
        self.assertNotEqual(run.returncode, 0)
        return [line for line in wrong.splitlines() if line.startswith("gemma: error: ")]


class LearnsAsOne(RanksTest):
    def check_equal(self, ranks, accumulate, *more):
        found = self.together(ranks, "many", *more, "--accumulate", accumulate)
        expected = self.train("one", *more, "--accumulate", ranks * accumulate)
        self.assertEqual(found["ranks"], ranks)
        self.assertEqual(expected["ranks"], 1)
        for field in ("steps", "tokens", "best_step"):
            self.assertEqual(found[field], expected[field], field)
        self.assertGreater(found["exchanged_bytes_per_step"], 0)
        rows, others = self.log("many"), self.log("one")
        self.assertEqual(len(rows), len(others))
        for row, other in zip(rows, others):
            for name, value in other.items():
                if name != "seconds":
                    self.assertLess(abs(row[name] - value), 1e-6 * max(abs(value), 1e-9), name)
        return found

    def test_an_adapter(self):
        found = self.check_equal(2, 1, "--epochs", 3, "--eval-data", self.data, "--eval-every", 2)
        file = "adapter/adapter_model.safetensors"
        many, one = (matrices_of(self.folder / out / file) for out in ("many", "one"))
        self.assertEqual(many.keys(), one.keys())
        for name, values in many.items():
            self.assertLess(distance(values, one[name]), 1e-6, name)
        self.assertEqual(found["exchanged_bytes_per_step"], 4 * sum(map(len, one.values())))

    def test_weights_and_a_ragged_end(self):
        # 6 batches an epoch, 12 in all, 9 of a step: rank 0 has 2 of the last step's 3, others 1 or none
        self.check_equal(3, 3, "--epochs", 2, "--full")
        many, one = (matrices_of(self.folder / out / "model/model.safetensors") for out in ("many", "one"))
        for name, values in many.items():
            self.assertLess(distance(values, one[name]), 1e-6, name)


class StopsTogether(RanksTest):
    MORE = ("--epochs", 40, "--lora-dropout", 0.1, "--save-every", 4)

    def kill(self, run):
        """Kills mpirun and its ranks: those would write on for a while, into the folder that the next run goes on in."""
        children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.send_signal(signal.SIGKILL)
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        run.communicate(timeout=100)

    def test_a_killed_run_ends_in_the_same_bits(self):
        self.together(2, "whole", *self.MORE)
        run = self.start(2, "cut", *self.MORE)
        cli.wait_for_lines(self.folder / "cut" / "log.jsonl", 6, run)
        self.kill(run)
        self.together(2, "cut", *self.MORE, "--resume")
        self.assertEqual(self.matrices("cut"), self.matrices("whole"))
        self.assertEqual(len(self.log("cut")), len(self.log("whole")))

    def test_an_interrupt_of_one_rank_stops_all(self):
        run = self.start(2, "cut", *self.MORE)
        cli.wait_for_lines(self.folder / "cut" / "log.jsonl", 2, run)
        children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGINT)  # rank 1
        (line,) = self.fails(run)
        self.assertRegex(line, r"error: \[finetune\] stopped after step \d+ of 120, which is kept")
        kept = int(re.search(r"step (\d+)", line)[1])
        self.assertTrue((self.folder / "cut" / "checkpoints" / f"step-{kept:08}").is_dir())

    def test_an_error_of_all_is_told_once(self):
        self.data.write_text("{\n")
        (line,) = self.fails(self.start(2, "run"))
        self.assertIn("[training_data]", line)
        (line,) = self.fails(self.start(2, "run", "--no-such-flag"))
        self.assertIn("error: [usage]", line)
        (line,) = self.fails(self.start(2, "run", "--plain-text"))
        self.assertIn("expected one process to make the model and cut the text, got 2 ranks", line)
        self.assertFalse((self.folder / "run").exists())

    def test_an_error_of_one_ends_all(self):
        (self.folder / "run").write_text("no folder")  # rank 0 alone writes
        (line,) = self.fails(self.start(2, "run"))
        self.assertIn("gemma: error: rank 0 of 2: ", line)

    def test_ranks_are_not_changed_when_a_run_goes_on(self):
        run = self.start(2, "cut", *self.MORE)
        cli.wait_for_lines(self.folder / "cut" / "log.jsonl", 6, run)
        self.kill(run)
        shown = error(*self.command("cut", *self.MORE, "--resume"))
        self.assertIn("ranks: expected 2, as the run began with, got 1", shown)


if __name__ == "__main__":
    cli.main()
