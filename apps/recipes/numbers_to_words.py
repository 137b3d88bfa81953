#!/usr/bin/env python3
"""Examples of a house style, numbers written out in words: lines for `gemma finetune` and `gemma eval`.

    python3 apps/recipes/numbers_to_words.py --out FOLDER [--train 400] [--test 100] [--seed 1]

Writes FOLDER/train.jsonl and FOLDER/test.jsonl. No sentence is in both, and neither is a number above twenty.
"""
import argparse
import json
import pathlib
import random

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
FRAMES = [
    "The train leaves in {} minutes.",
    "We counted {} birds on the lake.",
    "She lives at number {} in our street.",
    "The box weighs {} grams.",
    "About {} people came to the meeting.",
    "He paid {} euros for the bicycle.",
    "The book has {} pages.",
    "Turn left after {} metres.",
    "There were {} letters and {} parcels.",
    "The tower is {} years old and {} feet high.",
    "Add {} cups of flour to {} eggs.",
    "They sold {} tickets in {} hours.",
]


def words(n):
    """0 .. 999 in British English."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")


def example(frame, numbers):
    plain, styled = frame.format(*numbers), frame.format(*map(words, numbers))
    return {"prompt": f"Plain: {plain}\nIn words:", "completion": f" {styled}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    large = list(range(21, 1000))
    draw.shuffle(large)
    pools = {"train": large[: len(large) * 3 // 4], "test": large[len(large) * 3 // 4 :]}
    args.out.mkdir(parents=True, exist_ok=True)
    seen = set()
    for name, count in (("train", args.train), ("test", args.test)):
        lines = []
        while len(lines) < count:
            frame = draw.choice(FRAMES)
            small = draw.random() < 0.2
            numbers = [draw.randrange(21) if small else draw.choice(pools[name]) for _ in range(frame.count("{}"))]
            line = json.dumps(example(frame, numbers))
            if line not in seen:
                seen.add(line)
                lines.append(line)
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{args.out}/{name}.jsonl: {count} examples")


if __name__ == "__main__":
    main()
