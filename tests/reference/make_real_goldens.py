#!/usr/bin/env python3
"""Makes tests/golden/real_270m.json: what transformers computes with the real weights.

    python tests/reference/make_real_goldens.py --model HF_FOLDER [--out tests/golden]

Float32, eager attention, no cache for logits. Entries:
meta        command, versions, date, sha256 of model.safetensors
fixed_ids   eight ids whose logits are kept at every listed position, likely or not
prompts     name, text (null: the start of long_text.txt), ids (T); argmax (T) and gap (T), the
            lead of the best logit over the second; at `positions`: top_ids and top_logits (P, 8),
            fixed_logits (P, 8); greedy, 48 new ids, with greedy_gap
perplexity  ids of long_text.txt after BOS, and mean negative log-likelihoods (nats a token):
            c512 in chunks of 512 (BOS over each chunk's first token, tokens 257 to 511 scored,
            the partial chunk dropped, as llama-perplexity counts), c0 as one sequence
bfloat16    mean KL(float32 || bfloat16) in nats of transformers' own bfloat16 over the first
            `tokens` ids of perplexity.ids as one sequence, all positions, with eager attention
            and with sdpa; top1_equal is the share of positions where the argmax agrees
long_text.txt is chapter II of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public
domain), from the Canterbury corpus' alice29.txt with the line breaks inside paragraphs removed.
Versions: requirements.txt.
"""

import argparse
import datetime
import hashlib
import math
import pathlib
import sys

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from common import logits_in_pieces, provenance, save_json, transformers_model

PROMPTS = {
    "short": "The capital of France is",
    "prose": "The lighthouse keeper counted the ships each evening and wrote their names in a blue "
    "notebook. On the last day of autumn one name was missing, so she lit a second lamp and waited",
    "multilingual": "Guten Morgen, wie geht es dir? Il pleut sur le vieux port. "
    "今日はとても寒いです。Сегодня мы идём в музей. "
    "السماء زرقاء والبحر هادئ। मुझे चाय पसंद है। 我喜欢在晚上读书。",
    "code": "#include <vector>\n\n// Returns the sum of the squares of x.\n"
    "double sum_of_squares(const std::vector<double>& x) {\n  double sum = 0.0;\n  for (double",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144\n3.14159265 * 2 = 6.2831853\n"
    "2024-02-29T12:30:00Z\n17 + 25 = 42\n19 + 24 =",
    "chat": "<start_of_turn>user\nName three rivers.<end_of_turn>\n<start_of_turn>model\n",
    "odd": "  two  spaces\tand a tab\n\n\n🙂👩‍🚀 naïve café ½ ≠ ∞   <b>bold</b> [multimodal]\n",
    "long": None,
}
LONG_TOKENS = 1150
BFLOAT16_TOKENS = 1000
FIXED_IDS = [0, 1, 2, 106, 506, 5279, 131071, 262143]
SPREAD, TOP, GREEDY = 20, 8, 48


def kept_positions(count):
    """First, last, the edge of the 512 window, and SPREAD over the whole of `count`."""
    spread = {round(i * (count - 1) / (SPREAD - 1)) for i in range(SPREAD)}
    return sorted(p for p in spread | set(range(510, 515)) if p < count)


def rounded(rows, digits):
    return [[round(x, digits) for x in row] for row in rows.tolist()]


def lead(logits):
    best = logits.topk(2).values  # (T, 2)
    return (best[:, 0] - best[:, 1]).tolist()


@torch.no_grad()
def greedy(model, ids):
    """GREEDY new ids of generate(), never stopping, and the lead of each."""
    settings = GenerationConfig(max_new_tokens=GREEDY, do_sample=False, pad_token_id=0)
    model.generation_config = settings  # the folder's own would add a stop id
    new = model.generate(torch.tensor([ids]), settings)[0, len(ids) :]
    hidden = model.model(torch.tensor([ids + new.tolist()])).last_hidden_state[0]
    logits = model.lm_head(hidden[len(ids) - 1 : -1])
    if not torch.equal(logits.argmax(-1), new):
        raise ValueError("[greedy] generate() and one forward pass differ: a near tie")
    return {"greedy": new.tolist(), "greedy_gap": [round(x, 4) for x in lead(logits)]}


def prompt_golden(model, ids):
    positions = kept_positions(len(ids))
    golden = {"ids": ids, "positions": positions, "argmax": [], "gap": []}
    golden |= {"top_ids": [], "top_logits": [], "fixed_logits": []}
    for start, logits in logits_in_pieces(model, ids):
        golden["argmax"] += logits.argmax(-1).tolist()
        golden["gap"] += [round(x, 4) for x in lead(logits)]
        rows = logits[[p - start for p in positions if start <= p < start + len(logits)]]
        best = rows.topk(TOP)
        golden["top_ids"] += best.indices.tolist()
        golden["top_logits"] += rounded(best.values, 5)
        golden["fixed_logits"] += rounded(rows[:, FIXED_IDS], 5)
    return golden | greedy(model, ids)


def log_likelihoods(model, ids):
    """log p(ids[i + 1] | ids[: i + 1]) for every i, in float64."""
    scores = []
    for start, logits in logits_in_pieces(model, ids):
        logits = logits.double()
        targets = torch.tensor(ids[start + 1 : start + 1 + len(logits)])
        logits = logits[: len(targets)]
        chosen = logits.gather(1, targets[:, None])[:, 0]
        scores += (chosen - logits.logsumexp(-1)).tolist()
    return scores


def mean_nll(scores):
    return {"tokens": len(scores), "nll": round(-math.fsum(scores) / len(scores), 7)}


def perplexity_golden(model, ids):
    size, bos = 512, ids[0]
    scored, chunks = [], []
    for start in range(0, len(ids) - size + 1, size):
        scores = log_likelihoods(model, [bos, *ids[start + 1 : start + size]])[size // 2 :]
        scored += scores
        chunks.append(mean_nll(scores)["nll"])
    c512 = mean_nll(scored) | {"chunk_nll": chunks}
    return {"ids": ids, "c512": c512, "c0": mean_nll(log_likelihoods(model, ids))}


@torch.no_grad()
def bfloat16_golden(model, folder, ids):
    golden = {"tokens": len(ids)}
    for attention in ("eager", "sdpa"):
        other = transformers_model(folder, torch.bfloat16, attention)
        divergence, equal = 0.0, 0
        pairs = zip(logits_in_pieces(model, ids), logits_in_pieces(other, ids), strict=True)
        for (_, exact), (_, rough) in pairs:
            p, q = exact.double().log_softmax(-1), rough.double().log_softmax(-1)
            divergence += (p.exp() * (p - q)).sum().item()
            equal += (exact.argmax(-1) == rough.argmax(-1)).sum().item()
        golden[attention] = {
            "mean_kl": round(divergence / len(ids), 8),
            "top1_equal": round(equal / len(ids), 4),
        }
    return golden


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--model", required=True, type=pathlib.Path, help="HF folder")
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "golden")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = (here.parent / "golden" / "long_text.txt").read_text(encoding="utf-8")
    long_ids = tokenizer.encode(text).ids
    model = transformers_model(args.model, torch.float32)
    weights = (args.model / "model.safetensors").read_bytes()
    meta = provenance(
        date=datetime.date.today(),
        dtype="float32",
        attention="eager",
        model_safetensors_sha256=hashlib.sha256(weights).hexdigest(),
    )
    prompts = []
    for name, prompt in PROMPTS.items():
        ids = tokenizer.encode(prompt).ids if prompt else long_ids[:LONG_TOKENS]
        prompts.append({"name": name, "text": prompt} | prompt_golden(model, ids))
        print(f"{name}: {len(ids)} tokens", file=sys.stderr)
    golden = {"meta": meta, "fixed_ids": FIXED_IDS, "prompts": prompts}
    golden["perplexity"] = perplexity_golden(model, long_ids)
    golden["bfloat16"] = bfloat16_golden(model, args.model, long_ids[:BFLOAT16_TOKENS])
    save_json(args.out / "real_270m.json", golden)


if __name__ == "__main__":
    main()
