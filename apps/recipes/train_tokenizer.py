#!/usr/bin/env python3
"""A tokenizer of a text's own, for a model trained from scratch: `gemma finetune --from-scratch .. --tokenizer OUT`.

    python3 apps/recipes/train_tokenizer.py --text book.txt --pieces 4096 --out tokenizer.model

Pairs of pieces are merged as in Gemma's tokenizer (BPE), text is cut as it is, and what no piece has is written in bytes.
Needs sentencepiece: pip install sentencepiece.
"""
import argparse
import pathlib

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 to 3, as Gemma has them


def train(text, pieces, out):
    import sentencepiece

    out = pathlib.Path(out)
    with open(out, "wb") as file:
        named = {f"{name.strip('<>')}_id": i for i, name in enumerate(SPECIAL)}
        named |= {f"{name.strip('<>')}_piece": name for name in SPECIAL}
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_writer=file, model_type="bpe", vocab_size=pieces, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
            **named)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--pieces", type=int, default=4096, help="the config's vocab_size")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    train(args.text, args.pieces, args.out)


if __name__ == "__main__":
    main()
