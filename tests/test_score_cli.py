#!/usr/bin/env python3
"""gemma score from outside: tokens of pairs, accuracy, classification, files that go on.

    python3 tests/test_score_cli.py GEMMA WRITE_TINY_MODEL [unittest arguments]
"""

import json
import math
import pathlib
import signal
import subprocess
import tempfile
import unittest

import test_cli as cli
from test_cli import ABC, BOS, error, gemma, model, one_object

SPACE, D, SPACE_A, CD, TURN = 268, 272, 278, 280, 4  # support/vocabularies.h
TASK_FIELDS = """model engine isa device dtype quant resumed seconds task n answered truncated
    dropped_tokens items"""
ROW_FIELDS = "answer context_tokens dropped_tokens ids is_greedy logprob logprobs predicted"


def spread(values):
    """Standard error of a mean, as lm-evaluation-harness has it."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


class Score(cli.CliTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.out = self.folder / "out.jsonl"

    def file(self, rows, name="items"):
        path = self.folder / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    def choices(self, rows, *more, name="text"):
        return one_object("score", *model(name), "--choices", self.file(rows), *more)

    def close(self, a, b):
        """The same log-probabilities; engines of other capacities sum in another order."""
        self.assertEqual([len(row) for row in a], [len(row) for row in b])
        for found, expected in zip(sum(a, []), sum(b, [])):
            self.assertAlmostEqual(found, expected, places=4)

    def wrong(self, *more, name="text", code=1):
        return error("score", *model(name), *more, code=code)


class Continuations(Score):
    def test_each_is_scored_token_by_token(self):
        value = one_object("score", *model("text"), "-p", "abc", "-c", " a", "-c", "cd")
        self.fields(
            value,
            """model engine isa device dtype quant resumed seconds task context_ids context_pieces
            continuations""",
        )
        self.assertEqual(value["context_ids"], [BOS, ABC])
        self.assertEqual([row["ids"] for row in value["continuations"]], [[SPACE_A], [CD]])
        for row in value["continuations"]:
            self.fields(row, "ids pieces labels logprobs logprob is_greedy")
            self.assertAlmostEqual(row["logprob"], sum(row["logprobs"]), places=9)
        # what `perplexity` says of the same tokens
        ids = ("--ids", f"{BOS},{ABC}", "--continuation-ids")
        value = one_object("score", *model("ids"), *ids, "270,271,5")
        whole = one_object(
            "perplexity", *model("ids"), "--ids", f"{BOS},{ABC},270,271,5", "-c", 0, "--per-token"
        )
        found = value["continuations"][0]
        self.assertIsNone(found["pieces"])
        for logprob, row in zip(found["logprobs"], whole["per_token"][1:], strict=True):
            self.assertAlmostEqual(logprob, row["logprob"], places=4)

    def test_greedy_is_what_generation_says(self):
        run = (*model("ids"), "--ids", "2,269,270")
        best = one_object("generate", *run, "-n", 4, "--greedy", "--ctx", 16)["ids"]
        listed = ",".join(map(str, best))
        worse = ",".join(map(str, [*best[:-1], (best[-1] + 1) % 300]))
        more = ("--continuation-ids", listed, "--continuation-ids", worse)
        rows = one_object("score", *run, *more)["continuations"]
        self.assertEqual([row["is_greedy"] for row in rows], [True, False])

    def test_as_text_the_likeliest_comes_first(self):
        run = ("score", *model("text"), "-p", "abc", "-c", "a", "-c", "b", "-c", " a cd")
        lines = gemma(*run).stdout.splitlines()
        self.assertEqual(lines[0].split(), "logprob tokens greedy token by token".split())
        values = [float(line.split()[0]) for line in lines[1:4]]
        self.assertEqual(values, sorted(values, reverse=True))
        self.assertRegex(lines[-1], r"^text, eager engine, float32$")


class Choices(Score):
    def test_pairs_are_cut_where_the_harness_cuts(self):
        for context, choice, delimiter, length, ids in (
            ("abc", "a", " ", 2, [SPACE_A]),
            ("abc ", "a", "", 2, [SPACE_A]),  # the space moves
            ("abc \n\u2003", "a", "", 2, None),
            ("a", "b", "", 2, []),  # one piece, ab: nothing is left
            ("a", "bcd", "", 2, [D]),  # abcd is abc d
            ("", "abc", "", 1, [ABC]),
            ("", "abc", " ", 1, [SPACE, ABC]),
            ("  ", "abc", "", 1, None),
            ("<bos>abc", "cd", "", 2, [CD]),  # no second <bos>
            ("", "<bos>abc", "", 1, [ABC]),
            ("abc", "<start_of_turn>", "", 2, [TURN]),
        ):
            with self.subTest(context=context, choice=choice):
                row = {"context": context, "choices": [choice]}
                more = ("--delimiter", delimiter)
                if ids == []:
                    refused = self.wrong("--choices", self.file([row]), *more)
                    self.assertIn("expected at least one token of its own", refused)
                    continue
                found = self.choices([row], *more)["items"][0]
                self.assertEqual(found["context_tokens"], length)
                moved = context[len(context.rstrip()) :]
                whole = one_object(
                    "tokenize", *model("text"), "-p", context + delimiter + choice
                )["ids"]
                self.assertEqual(found["ids"][0], ids or whole[length:])
                self.assertTrue(ids or len(found["ids"][0]) > 1, moved)

    def test_accuracy(self):
        rows = [
            {"context": "abc", "choices": ["a", "b cd", "é"], "answer": n % 3, "more": n}
            for n in range(5)
        ]
        rows[3]["answer"] = "b cd"
        rows += [{"context": "cd", "choices": ["a", "abcabc"]}]
        value = self.choices(rows)
        self.fields(value, TASK_FIELDS + " acc acc_stderr acc_norm acc_norm_stderr")
        self.assertEqual((value["n"], value["answered"], value["task"]), (6, 5, "choices"))
        answers = [0, 1, 2, 1, 1]
        right = {"acc": [], "acc_norm": []}
        for row, item in zip(rows, value["items"], strict=True):
            self.fields(item, ROW_FIELDS + " predicted_norm")
            sums = [sum(logprobs) for logprobs in item["logprobs"]]
            for found, expected in zip(item["logprob"], sums, strict=True):
                self.assertAlmostEqual(found, expected, places=9)
            by_length = [s / len(choice) for s, choice in zip(sums, row["choices"], strict=True)]
            self.assertEqual(item["predicted"], sums.index(max(sums)))
            self.assertEqual(item["predicted_norm"], by_length.index(max(by_length)))
        for item, answer in zip(value["items"], answers):
            self.assertEqual(item["answer"], answer)
            right["acc"].append(item["predicted"] == answer)
            right["acc_norm"].append(item["predicted_norm"] == answer)
        self.assertIsNone(value["items"][5]["answer"])
        for name, values in right.items():
            self.assertAlmostEqual(value[name], sum(values) / 5)
            self.assertAlmostEqual(value[f"{name}_stderr"], spread(values))

    def test_length_is_in_characters(self):
        # é is one character of two bytes; by bytes another choice would win in one of the items
        rows = [{"context": c, "choices": ["é" * 4, "a"]} for c in ("a", "b", "abc", "cd")]
        for item in self.choices(rows)["items"]:
            by_length = [item["logprob"][0] / 4, item["logprob"][1]]
            self.assertEqual(item["predicted_norm"], by_length.index(max(by_length)))

    def test_ids(self):
        rows = [{"ids": [2, 269], "choices_ids": [[270], [271, 272]], "answer": 1}]
        value = self.choices(rows * 2, name="ids")
        self.assertEqual(value["items"][0]["ids"], [[270], [271, 272]])
        self.assertIsNone(value["items"][0]["predicted_norm"])  # no characters
        self.assertIsNone(value["acc_norm"])
        self.assertIn(value["acc"], (0, 1))
        self.assertEqual(value["acc_stderr"], 0)
        refused = self.wrong("--choices", self.file([{"context": "a", "choices": ["b"]}]), name="ids")
        self.assertIn('no tokenizer. Hint: --ids, --continuation-ids, or lines such as {"ids"', refused)

    def test_cutting_is_stated(self):
        rows = [{"context": "abc" * 20, "choices": ["cd"]}, {"context": "abc", "choices": ["cd"]}]
        whole = self.choices(rows)
        self.assertEqual((whole["truncated"], whole["dropped_tokens"]), (0, 0))
        length = whole["items"][0]["context_tokens"]
        cut = self.choices(rows, "--max-tokens", 6)
        self.assertEqual((cut["truncated"], cut["dropped_tokens"]), (1, length - 6))
        self.assertEqual(cut["items"][0]["context_tokens"], 6)
        # <bos> and the last five
        ids = one_object("tokenize", *model("text"), "-p", rows[0]["context"])["ids"]
        ids = {"ids": [BOS, *ids[-5:]], "choices_ids": cut["items"][0]["ids"]}
        self.close(self.choices([ids])["items"][0]["logprobs"], cut["items"][0]["logprobs"])
        shown = gemma("score", *model("text"), "--choices", self.file(rows), "--max-tokens", 6)
        self.assertIn(f"1 of them cut: {length - 6} tokens left out", shown.stdout)
        long = self.file([{"context": "abc" * 300, "choices": ["cd"]}])
        refused = self.wrong("--choices", long)
        self.assertRegex(refused, r"line 1: expected at most the model's 256 tokens, got \d+. Hint")

    def test_bad_items(self):
        good = {"context": "a", "choices": ["b", "c"], "answer": 0}
        for row, why in (
            ("{", "[json]"),
            ("", "line 2: expected an item, got an empty line"),
            ("[]", 'expected "context" and "choices", or "ids" and "choices_ids", got []'),
            (good | {"choices": []}, 'expected "context" and "choices"'),
            (good | {"choices": ["b", ""]}, 'choices: expected texts, got ""'),
            (good | {"choices": ["b", 3]}, "choices: expected texts, got 3"),
            (good | {"answer": 2}, "answer: expected one of the choices or its index, 0 to 1, got 2"),
            (good | {"answer": -1}, "got -1"),
            (good | {"answer": "d"}, 'got "d"'),
            (good | {"answer": 0.5}, "got 0.5"),
            ({"ids": [2], "choices_ids": [[]]}, "choices_ids: expected lists of token ids, got []"),
            ({"ids": [2], "choices_ids": [[1.5]]}, "expected a list of token ids, got 1.5"),
        ):
            refused = self.wrong("--choices", self.file([good, row]))
            self.assertIn(why, refused)
            self.assertTrue("line 2" in refused or row == "{", refused)
        self.assertIn("got an empty file", self.wrong("--choices", self.file([])))
        refused = self.wrong("--choices", self.file([{"ids": [300], "choices_ids": [[2]]}]))
        self.assertIn("context: expected ids from 0 to 299, got 300", refused)


class Classify(Score):
    TEXTS = [("abc", "a"), ("cd", "b"), ("a b", "b"), ("b", "a"), ("abab", "b"), ("c", None)]

    def classify(self, *more, texts=None):
        rows = [{"text": text, "label": label} for text, label in texts or self.TEXTS]
        flags = ("--classify", self.file(rows), "--labels", "a,b", "--template", "c{text}d")
        return one_object("score", *model("text"), *flags, *more)

    def test_plain_and_calibrated(self):
        value = self.classify()
        self.fields(value, TASK_FIELDS + " labels plain calibrated template content_free")
        self.assertEqual((value["n"], value["answered"]), (6, 5))
        (free,) = value["content_free"]
        self.assertEqual(free["text"], "")
        for item, (text, label) in zip(value["items"], self.TEXTS, strict=True):
            self.fields(item, ROW_FIELDS + " probabilities calibrated predicted_calibrated")
            self.assertEqual(item["answer"], {"a": 0, "b": 1, None: None}[label])
            choices = self.choices([{"context": f"c{text}d", "choices": ["a", "b"]}])["items"][0]
            self.close(item["logprobs"], choices["logprobs"])
            self.assertAlmostEqual(sum(item["probabilities"]), 1)
            self.assertAlmostEqual(
                math.log(item["probabilities"][0] / item["probabilities"][1]),
                item["logprob"][0] - item["logprob"][1],
            )
            scaled = [p / q for p, q in zip(item["probabilities"], free["probabilities"])]
            for found, expected in zip(item["calibrated"], scaled):
                self.assertAlmostEqual(found, expected / sum(scaled))
            self.assertEqual(item["predicted_calibrated"], scaled.index(max(scaled)))
        for name, key in (("plain", "predicted"), ("calibrated", "predicted_calibrated")):
            confusion = [[0, 0], [0, 0]]
            for item in value["items"][:5]:
                confusion[item["answer"]][item[key]] += 1
            self.assertEqual(value[name]["confusion"], confusion)
            self.assertAlmostEqual(value[name]["accuracy"], (confusion[0][0] + confusion[1][1]) / 5)
            f1 = [row["f1"] for row in value[name]["labels"]]
            self.assertAlmostEqual(value[name]["macro_f1"], sum(f1) / 2)

    def test_several_texts_without_content(self):
        value = self.classify("--content-free", "N/A", "--content-free", "")
        self.assertEqual([row["text"] for row in value["content_free"]], ["N/A", ""])
        self.assertEqual(value["n"], 6)
        free = [
            (a + b) / 2 for a, b in zip(*(row["probabilities"] for row in value["content_free"]))
        ]
        item = value["items"][0]
        scaled = [p / q for p, q in zip(item["probabilities"], free)]
        self.assertAlmostEqual(item["calibrated"][0], scaled[0] / sum(scaled))

    def test_texts_are_cut_and_the_template_stays(self):
        texts = [("cd" * 20, "a"), ("cd", "b"), ("b" + "\U0001f389" * 3, "b")]
        value = self.classify("--max-tokens", 3, texts=texts)
        self.assertEqual(value["truncated"], 2)
        self.assertEqual([row["dropped_tokens"] for row in value["items"]], [17, 0, 12])
        same = self.classify(texts=[("cdcdcd", "a"), ("cd", "b"), ("b", "b")])
        for cut, whole in zip(value["items"], same["items"], strict=True):
            self.close(cut["logprobs"], whole["logprobs"])

    def test_the_table(self):
        rows = self.file([{"text": text, "label": label} for text, label in self.TEXTS])
        flags = ("--classify", rows, "--labels", "a,b", "--template", "c{text}d")
        shown = gemma("score", *model("text"), *flags).stdout
        self.assertRegex(shown, r"(?m)^6 texts, 5 with an answer$")
        self.assertRegex(shown, r'(?m)^after "": a \d\.\d{4} b \d\.\d{4}$')
        for name in ("plain", "calibrated"):
            self.assertRegex(shown, rf"(?m)^{name}: accuracy \S+ \+- \S+, macro F1 \S+$")
        self.assertEqual(shown.count("precision   recall       F1"), 2)

    def test_refusals(self):
        rows = self.file([{"text": "a", "label": "spam"}])
        run = ("--classify", rows, "--labels")
        self.assertIn("line 1: label: expected one of a, b", self.wrong(*run, "a,b", "--template", "{text}"))
        for template in ("text", "{text} {text}"):
            self.assertIn("{text} once", self.wrong(*run, "a,b", "--template", template))
        for labels in ("a", "a,a", "a,"):
            self.assertIn("at least two", self.wrong(*run, labels, "--template", "{text}"))
        self.assertIn("no tokenizer", self.wrong(*run, "a,b", "--template", "{text}", name="ids"))
        self.assertIn("--template", self.wrong(*run, "a,b", code=2))
        self.assertIn("--labels", self.wrong("--classify", rows, "--template", "{text}", code=2))
        rows = self.file([{"txt": "a"}])
        self.assertIn('expected "text"', self.wrong("--classify", rows, "--labels", "a,b", "--template", "{text}"))


class Results(Score):
    ROWS = [{"context": "abc" * n, "choices": ["a", "b cd"], "answer": 1} for n in range(1, 9)]

    def run_out(self, *more, rows=None):
        return self.choices(rows or self.ROWS, "-o", self.out, *more)

    def same(self, a, b):
        for value in (a, b):
            for key in ("seconds", "resumed"):
                value.pop(key)
        self.assertEqual(a, b)

    def test_a_cut_run_goes_on(self):
        whole = self.run_out()
        self.assertEqual(whole["resumed"], 0)
        content = self.out.read_bytes()
        lines = content.splitlines(keepends=True)
        self.assertEqual(len(lines), 1 + len(self.ROWS))
        self.assertEqual([json.loads(line) for line in lines[1:]], whole["items"])
        # nothing, half the header, the header, some rows, half a row, all
        for kept in (b"", lines[0][:20], lines[0], b"".join(lines[:4]), content[:-9], content):
            self.out.write_bytes(kept)
            again = self.run_out()
            self.assertEqual(again["resumed"], max(0, kept.count(b"\n") - 1))
            self.assertEqual(self.out.read_bytes(), content)
            self.same(again, dict(whole))

    def test_classification_goes_on_too(self):
        rows = self.file([{"text": "abc" * n, "label": "a"} for n in range(1, 5)], "texts")
        flags = ("--classify", rows, "--labels", "a,b", "--template", "{text}", "-o", self.out)
        whole = one_object("score", *model("text"), *flags)
        content = self.out.read_bytes()
        for kept in (1, 2, 4):  # without, and with what the content-free text gave
            self.out.write_bytes(b"".join(content.splitlines(keepends=True)[:kept]))
            self.same(one_object("score", *model("text"), *flags), dict(whole))
            self.assertEqual(self.out.read_bytes(), content)

    def test_another_run_s_file_is_refused(self):
        self.run_out()
        content = self.out.read_bytes()
        for more, rows, why in (
            (("--delimiter", "b"), None, 'delimiter: expected "b", the file has " "'),
            (("--max-tokens", 4), None, "max_tokens: expected 4, the file has 0"),
            (("--dtype", "bfloat16"), None, "dtype: expected"),
            ((), self.ROWS[:3], "items: expected 3, the file has 8"),
            ((), [row | {"choices": ["a", "b"]} for row in self.ROWS], "tokens: expected"),
            ((), [row | {"answer": 0} for row in self.ROWS], "tokens: expected"),
        ):
            run = ("--choices", self.file(rows or self.ROWS), "-o", self.out, *more)
            refused = self.wrong(*run)
            self.assertRegex(refused, r"^gemma: error: \[results\] \S+: ")
            self.assertTrue(why in refused or more and more[0] == "--dtype", refused)
            self.assertEqual(self.out.read_bytes(), content)
        other = error("score", "-m", cli.MODELS / "golden", "--choices",
                      self.file([{"ids": [2], "choices_ids": [[3]]}]), "-o", self.out)
        self.assertIn("[results]", other)
        self.assertEqual(self.out.read_bytes(), content)

    def test_the_weights_count_not_their_path(self):
        self.run_out()
        copy = self.folder / "elsewhere" / "text"
        copy.mkdir(parents=True)
        for file in (cli.MODELS / "text").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        run = ("score", "-m", copy, "--choices", self.file(self.ROWS), "-o", self.out)
        self.assertEqual(one_object(*run)["resumed"], len(self.ROWS))
        weights = copy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        self.assertIn("weights: expected", error(*run))

    def test_a_file_of_something_else_is_left_alone(self):
        for content in (b"text", b"text\n", b'{"a": 1}\n{"b": 2}\n'):
            self.out.write_bytes(content)
            refused = self.wrong("--choices", self.file(self.ROWS), "-o", self.out)
            self.assertIn("expected a new file or one of this command's, got", refused)
            self.assertEqual(self.out.read_bytes(), content)
        refused = self.wrong("--choices", self.file(self.ROWS), "-o", "/nowhere/x")
        self.assertIn("[results] /nowhere/x: No such file", refused)

    def test_ctrl_c_keeps_what_is_done(self):
        rows = [{"context": "abc" * 30, "choices": ["a", "b cd"], "answer": 0}] * 3000
        items = self.file(rows)
        command = [cli.GEMMA, "score", *map(str, model("text")), "--choices", items, "-o", self.out]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        cli.wait_for_lines(self.out, 3, run)
        busy = self.wrong("--choices", items, "-o", self.out)
        self.assertIn("another process is writing it", busy)
        run.send_signal(signal.SIGINT)
        shown = run.communicate(timeout=300)[1]
        self.assertRegex(shown, r"^gemma: error: \[score\] stopped after \d+ of 3000 items. Hint: the")
        done = int(shown.split("stopped after ")[1].split()[0])
        self.assertEqual(run.returncode, 1)
        self.assertEqual(self.out.read_bytes().count(b"\n"), done + 1)
        self.assertTrue(self.out.read_bytes().endswith(b"\n"))


class Usage(Score):
    def test_one_task(self):
        items = self.file([{"context": "a", "choices": ["b"]}])
        for flags in (
            (),
            ("-p", "a"),
            ("--choices", items, "--classify", items),
            ("--choices", items, "-c", "b", "-p", "a"),
            ("--choices", items, "-p", "a"),
            ("--choices", items, "--labels", "a,b"),
            ("-p", "a", "-c", "b", "-o", self.out),
            ("-p", "a", "-c", "b", "--max-tokens", 3),
        ):
            self.assertIn("[usage]", self.wrong(*flags, code=2))
        self.assertIn("--continuation-ids", self.wrong("--ids", "2", "-c", "a"))
        self.assertIn("--ids", self.wrong("-p", "a", "--continuation-ids", "5"))
        self.assertIn("--max-tokens", self.wrong("--choices", items, "--max-tokens", -1))
        self.assertFalse(self.out.exists())

    def test_engines(self):
        rows = [{"context": "abc", "choices": ["a", "cd b"], "answer": 0}]
        eager = self.choices(rows)
        for flags in (("--engine", "traced"), ("--no-cache",)):
            other = self.choices(rows, *flags)
            for a, b in zip(eager["items"][0]["logprob"], other["items"][0]["logprob"]):
                self.assertAlmostEqual(a, b, places=4)


if __name__ == "__main__":
    cli.main()
