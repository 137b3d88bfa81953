#!/usr/bin/env python3
"""The recipes' own functions: reading tweets and mails, splits, answers as JSON, spans, F1, results that go on.

    python3 tests/test_recipes.py [unittest arguments]
"""

import argparse
import contextlib
import io
import json
import pathlib
import random
import sys
import tempfile
import unittest
from unittest import mock

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "apps" / "recipes"))

import named_entities  # noqa: E402
import recipe  # noqa: E402
import spam  # noqa: E402

TWEETS = (
    "New\tB-geo-loc\nYork\tI-geo-loc\nparis\tB-person\n.\tO\n\t\nhello\tO\n\t\nhello\tO\n\n"
    "Rome\tB-geo-loc\nOslo\tB-geo-loc\n"
)


def quiet_exit(call, *args):
    """What a call says as it ends the program."""
    try:
        call(*args)
    except SystemExit as end:
        return str(end.code)
    raise AssertionError("it went on")


class NamedEntities(unittest.TestCase):
    def test_tweets_are_read_once_each(self):
        tweets = named_entities.read_tweets(TWEETS)
        self.assertEqual([words for words, _ in tweets],
                         [("New", "York", "paris", "."), ("hello",), ("Rome", "Oslo")])
        crlf = named_entities.read_tweets(TWEETS.replace("\n", "\r\n"))
        self.assertEqual(crlf, tweets)

    def test_spans_of_tags(self):
        spans = [named_entities.spans_of_tags(tags) for _, tags in named_entities.read_tweets(TWEETS)]
        self.assertEqual(spans[0], [(0, 2, "geo-loc"), (2, 3, "person")])
        self.assertEqual(spans[1], [])
        self.assertEqual(spans[2], [(0, 1, "geo-loc"), (1, 2, "geo-loc")])  # two that touch

    def test_an_example_answers_itself(self):
        for words, tags in named_entities.read_tweets(TWEETS):
            row = named_entities.example(words, tags)
            self.assertIn(" ".join(words), row["prompt"])
            found = named_entities.match_spans(words, named_entities.parse_answer(row["completion"]))
            self.assertEqual(found, named_entities.spans_of_tags(tags))

    def test_what_is_an_answer(self):
        parse = named_entities.parse_answer
        self.assertEqual(parse(' [{"text": "a b", "type": "person"}]\n'), [("a b", "person")])
        self.assertEqual(parse(' [{"type": "person", "text": "a"}]'), [("a", "person")])
        self.assertEqual(parse("[]"), [])
        for bad in ("", "none", '{"text": "a", "type": "b"}', '[{"text": "a"}]', '["a"]', '[{"text": "a", "type": 1}]',
                    '[{"text": "a", "type": "b", "more": "c"}]', '[{"text": "a", "type": "b"}', "[] more", "3", "[3]"):
            self.assertIsNone(parse(bad), bad)

    def test_places_in_the_text(self):
        words = ("a", "b", "a", "b", "c")
        match = named_entities.match_spans
        self.assertEqual(match(words, [("a b", "x"), ("a b", "x")]), [(0, 2, "x"), (2, 4, "x")])
        self.assertEqual(match(words, [("a b c", "x"), ("b", "y")]), [(2, 5, "x"), (1, 2, "y")])
        # One too many, half a word, nothing at all, words that do not follow each other.
        for text in ("a b a b a", "A", "", "a c"):
            self.assertEqual(match(words, [(text, "x")]), [(None, 0, "x")], text)
        self.assertEqual(match(words, [("c", "x"), ("c", "x")]), [(4, 5, "x"), (None, 1, "x")])

    def test_measures_count_words_and_type(self):
        gold = [(0, 2, "person"), (3, 4, "geo-loc")]
        of = named_entities.measures
        self.assertEqual(of([(gold, gold)]), {"f1": 1, "precision": 1, "recall": 1})
        # One right, one of another type, one longer, one that is nowhere: 1 of 4 answered, 1 of 3 to find.
        found = of([(gold, [(0, 2, "person"), (3, 4, "company")]),
                    ([(1, 2, "movie")], [(1, 3, "movie"), (None, 1, "movie")])])
        self.assertAlmostEqual(found["precision"], 1 / 4)
        self.assertAlmostEqual(found["recall"], 1 / 3)
        self.assertAlmostEqual(found["f1"], 2 / 7)
        self.assertEqual(of([([], [])]), {"f1": 0, "precision": 0, "recall": 0})


class Splits(unittest.TestCase):
    def test_no_item_is_in_two_parts(self):
        items = [str(i) for i in range(50)]
        train, test = recipe.split(items, [30, 20], random.Random(1))
        self.assertEqual((len(train), len(test)), (30, 20))
        self.assertEqual(sorted(train + test), sorted(items))
        self.assertNotEqual(train, items[:30])
        self.assertEqual(recipe.split(items, [30, 20], random.Random(1)), [train, test])
        self.assertNotEqual(recipe.split(items, [30, 20], random.Random(2)), [train, test])
        self.assertIn("at most 50 examples", quiet_exit(recipe.split, items, [30, 21], random.Random(1)))


class Mails(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        for label, names in spam.FOLDERS.items():
            for name in names:
                (self.folder / name).mkdir()
            for i in range(6):
                text = f"Subject: {label} {i // 2}\n\nsome\n  text of {label}\n"
                (self.folder / names[0] / f"{i}.txt").write_text(text)

    def test_texts_are_cut_and_taken_once(self):
        texts = [mail["text"] for mail in spam.mails(self.folder, "spam", random.Random(1))]
        self.assertEqual(sorted(texts), [f"Subject: spam {i} some text of spam" for i in range(3)])
        cut = [mail["text"] for mail in spam.mails(self.folder, "spam", random.Random(1), characters=12)]
        self.assertEqual(cut, ["Subject: spa"])  # all alike now

    def test_train_and_test_share_none_and_are_balanced(self):
        draw = random.Random(1)
        streams = [spam.mails(self.folder, label, draw) for label in spam.FOLDERS]
        train, test = spam.balanced(streams, 4), spam.balanced(streams, 2)
        self.assertFalse({mail["text"] for mail in train} & {mail["text"] for mail in test})
        self.assertEqual([mail["label"] for mail in train + test], ["spam", "ham"] * 3)
        self.assertIn("Hint", quiet_exit(spam.balanced, streams, 2))

    def test_the_prompt_is_the_one_that_is_scored(self):
        row = spam.example({"text": "a {text}", "label": "ham"})
        self.assertEqual(row, {"prompt": spam.TEMPLATE.replace("{text}", "a {text}"), "completion": " ham"})

    def test_html_becomes_text(self):
        (self.folder / "spam-2" / "h.txt").write_text(
            "Subject: =?utf-8?q?caf=C3=A9?=\nContent-Type: text/html\n\n<style>x</style><p>a &amp; b</p>\n")
        self.assertEqual(spam.text_of(self.folder / "spam-2" / "h.txt"), "Subject: café a & b")


class Compare(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.args = argparse.Namespace(out=pathlib.Path(folder.name), seeds="1,2", peer="python", model="m", epochs=1)
        self.calls = []

    def compare(self):
        def train(_, program, seed, folder):
            self.calls.append(folder.name)
            if self.calls.count("gemma-2") == 1:
                raise KeyboardInterrupt
            return {"seconds": 10.0 * seed, "tokens_per_second": 5, "peak_gib": 1.5}

        def evaluate(adapter, file):
            return {"f1": 0.0 if adapter is None else 0.5}

        with mock.patch.object(recipe, "train", train), contextlib.redirect_stderr(io.StringIO()):
            return recipe.compare(self.args, evaluate)

    def test_what_is_done_is_not_done_again(self):
        with self.assertRaises(KeyboardInterrupt):
            self.compare()
        rows = self.compare()
        self.assertEqual(self.calls, ["gemma-1", "peft-1", "gemma-2", "gemma-2", "peft-2"])
        self.assertEqual([row["run"] for row in rows], ["before", "gemma-1", "peft-1", "gemma-2", "peft-2"])
        self.assertEqual(self.compare(), rows)
        self.assertEqual(len(self.calls), 5)
        self.args.epochs = 2
        self.assertIn("Hint: another --out", quiet_exit(self.compare))

    def test_the_table_has_means_and_spreads(self):
        with self.assertRaises(KeyboardInterrupt):
            self.compare()
        lines = recipe.table(self.compare(), [("F1", "f1", 2)]).splitlines()
        self.assertEqual(lines[0], "| | F1 | seconds | processor seconds | tok/s | GiB |")
        self.assertEqual(lines[2], "| before | 0.00 | - | - | - | - |")
        self.assertEqual(
            lines[3], "| gemma | 0.50 (0.50 .. 0.50) | 15 (10 .. 20) | - | 5 (5 .. 5) | 1.50 (1.50 .. 1.50) |")

    def test_training_that_was_cut_begins_anew(self):
        args = recipe.parser_of("", train=1).parse_args(["--out", str(self.args.out)])
        run = self.args.out / "gemma-1"
        (run / "checkpoints").mkdir(parents=True)
        found = {"seconds": 2, "tokens": 6, "tokens_per_second": 3, "peak_memory_bytes": 2**30}
        with mock.patch.object(recipe, "run", return_value=json.dumps(found)) as command:
            first = recipe.train(args, "gemma", 1, run)
            self.assertFalse((run / "checkpoints").exists())
            self.assertEqual(recipe.train(args, "gemma", 1, run), first)
        self.assertEqual(command.call_count, 1)
        self.assertEqual(first["peak_gib"], 1)


if __name__ == "__main__":
    unittest.main()
