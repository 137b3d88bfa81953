"""A recipe's training in transformers and PEFT, with the data and settings of `gemma finetune`: for apps/recipes.

    recipes_peft.py --model DIR --data train.jsonl --out DIR --seed N [--epochs N] [--batch-size N] ...

Reads lines {"prompt": "..", "completion": ".."} as `gemma finetune` does: <bos> prompt completion <eos>, loss on the
last two, an example cut to --max-tokens. LoRA with dropout 0 on all seven projections, alpha twice the rank, PEFT's own
first matrices; the order of examples, new in each epoch, and those matrices come from --seed. AdamW and clipping are
those of finetune_peft.py, the schedule is linear. Writes DIR/adapter and prints one JSON object; seconds are those of
the steps.
"""
import argparse
import json
import os
import resource
import sys
import time

import peft
import torch
import transformers
from finetune_peft import batch_of, make_optimizer, train_step

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_examples(path, tokenizer, max_tokens):
    """[(ids, place of the first target)], as batch_of() takes them."""
    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids
    # By its name: some folders' tokenizers say that <end_of_turn> is what ends a text.
    end = tokenizer.convert_tokens_to_ids("<eos>")
    examples = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = [tokenizer.bos_token_id] + encode(row["prompt"])
            ids = prompt + encode(row["completion"]) + [end]
            if len(prompt) < max_tokens:
                examples.append((ids[:max_tokens], len(prompt)))
    return examples


def make_model(args):
    base = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0,
                             target_modules=ALL)
    return peft.get_peft_model(base, config).train()


def batches_of(examples, args):
    """All batches of a run; each epoch has each example once, in an order of its own."""
    for _ in range(args.epochs):
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), args.batch_size):
            yield batch_of([examples[i] for i in order[start : start + args.batch_size]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    # As `gemma finetune` has them by default.
    parser.set_defaults(weight_decay=0.01, max_grad_norm=1.0, loss_dtype="float32")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    examples = read_examples(args.data, transformers.AutoTokenizer.from_pretrained(args.model), args.max_tokens)
    model = make_model(args)
    optimizer = make_optimizer(model, args)
    steps = args.epochs * -(-len(examples) // args.batch_size)
    schedule = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    seconds, tokens, losses = 0.0, 0, []
    for step, batch in enumerate(batches_of(examples, args), start=1):
        start = time.perf_counter()
        losses.append(train_step(model, optimizer, [batch], args)[0])
        schedule.step()
        seconds += time.perf_counter() - start
        tokens += int(batch[2].sum())
        if step <= 4 or step % 25 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {losses[-1]:.4f}, {tokens / seconds:.0f} tok/s", file=sys.stderr)
    model.save_pretrained(os.path.join(args.out, "adapter"))
    print(json.dumps({"steps": steps, "losses": losses, "seconds": seconds, "tokens": tokens,
                      "tokens_per_second": tokens / seconds,
                      "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
