"""Trains with transformers and PEFT on the very batches that `gemma finetune` reads: the oracle and the peer.

    finetune_peft.py --model DIR --data F.jsonl --out DIR [--adapter DIR | --full] [--dtype float32] ...

Reads lines {"prompt_ids": [..], "completion_ids": [..]} or {"ids": [..]} in the order of the file, --batch-size rows at a
time, --accumulate batches a step, padded at the right; the loss of a step is the mean over all its targets. AdamW and
the schedule are PyTorch's and transformers' own. Writes losses.json (and with --save the trained tensors) to --out and
prints one JSON object: losses, tok/s and peak memory.

--adapter DIR begins with an adapter in PEFT's files (rank, alpha and targets are the file's). The loss is transformers'
own, from logits in float32; --loss-dtype float64 takes the softmax over the vocabulary in double, whose rounding in
float32 is the largest of the whole pass.
"""
import argparse
import json
import os
import resource
import time

import torch
import transformers


def read_examples(path):
    examples = []
    with open(path) as file:
        for line in file:
            row = json.loads(line)
            if "ids" in row:
                ids, first = row["ids"], 1
            else:
                ids, first = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
            examples.append((ids, max(first, 1)))
    return examples


def batch_of(examples):
    """(ids, labels, attention mask): labels are -100 where nothing is predicted, as transformers has them."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (row, first) in enumerate(examples):
        row = torch.tensor(row)
        ids[i, : len(row)] = row
        labels[i, first : len(row)] = row[first:]
        mask[i, : len(row)] = 1
    return ids, labels, mask


def loss_of(model, dtype, ids, labels, mask, targets):
    if dtype == "float32":
        return model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets).loss
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / targets


def make_optimizer(model, args):
    decays = [p for n, p in model.named_parameters() if p.requires_grad and "norm" not in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "norm" in n]
    return torch.optim.AdamW(
        [{"params": decays, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate, fused=True)


def train_step(model, optimizer, batches, args):
    """One step over batches of batch_of(): its loss, the mean over all targets, and the length of its gradient."""
    targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in batches)
    total = 0.0
    for ids, labels, mask in batches:
        loss = loss_of(model, args.loss_dtype, ids, labels, mask, targets)
        loss.backward()
        total += loss.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = 0.0
    if args.max_grad_norm > 0:
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="sdpa", choices=["eager", "sdpa"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--schedule", default="linear", choices=["linear", "cosine", "constant"])
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loss-dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--save", action="store_true", help="the trained tensors too")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attention)
    if not args.full:
        import peft
        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    model.train()
    optimizer = make_optimizer(model, args)
    names = {"constant": "constant_with_warmup"}
    schedule = transformers.get_scheduler(
        names.get(args.schedule, args.schedule), optimizer, num_warmup_steps=args.warmup, num_training_steps=args.steps)

    examples = read_examples(args.data)
    batches = [batch_of(examples[i : i + args.batch_size]) for i in range(0, len(examples), args.batch_size)]
    losses, norms, seconds, tokens = [], [], [], []
    for step in range(args.steps):
        start = time.perf_counter()
        mine = [batches[(step * args.accumulate + i) % len(batches)] for i in range(args.accumulate)]
        total, norm = train_step(model, optimizer, mine, args)
        schedule.step()
        losses.append(total)
        norms.append(norm)
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(int(mask.sum()) for _, _, mask in mine))
    os.makedirs(args.out, exist_ok=True)
    if args.save:
        from safetensors.torch import save_file
        trained = {n: p.detach().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, os.path.join(args.out, "trained.safetensors"))
    # The first step pays for what is made once.
    warm = slice(1, None) if len(seconds) > 1 else slice(None)
    result = {"losses": losses, "grad_norms": norms, "tokens_per_second": sum(tokens[warm]) / sum(seconds[warm]),
              "seconds": seconds, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
              "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
